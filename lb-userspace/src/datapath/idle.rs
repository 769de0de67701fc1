//! Who is to be told by a reset that an idle connection was given up: the ends next to this node, each by what the entry
//! knows of the other.
//!
//! Of a connection through two nodes both have an entry with the same timer, and each tells its own end.

use std::net::SocketAddr;

use lb_common::{
    backend::{Backend, Kind, RETURN_DIRECT},
    flow::{Flow, FlowKey, REPLY, REPLY_BY_PEER, REPLY_DIRECT, REQUEST},
    net::{Address, Be16},
};

use crate::net::Reset;

/// The resets for an established flow of TCP, as its entry was when it was taken out. An idle connection's next numbers
/// are what its ends expect.
pub(super) fn resets<A: Address>(key: &FlowKey<A>, flow: &Flow<A>, backend: &Backend) -> Vec<Reset> {
    let to_task = |from, to| Reset { from, to, sequence: flow.client_next, acknowledgment: flow.task_next };
    let to_client = |from, to| Reset { from, to, sequence: flow.task_next, acknowledgment: flow.client_next };
    let rewrite = &flow.rewrite;
    let rewritten =
        (at(rewrite.source, rewrite.source_port), at(rewrite.destination, rewrite.destination_port));
    let (source, destination) = (at(key.source, key.source_port), at(key.destination, key.destination_port));
    let (kind, direct) = (Kind::try_from(backend.kind).ok(), backend.flags & RETURN_DIRECT != 0);
    match (flow.role, kind) {
        // The task's answers pass elsewhere, so that its number is not known here: its own node tells both ends.
        (REQUEST, Some(Kind::Peer)) if direct => vec![],
        (REQUEST, Some(Kind::Peer)) => vec![to_client(destination, source)],
        (REQUEST, Some(Kind::Local | Kind::Routed)) => {
            vec![to_client(destination, source), to_task(rewritten.0, rewritten.1)]
        }
        // Of snat's two entries this one sees the client alone; the other has what the task sent and acknowledged.
        (REQUEST, _) => vec![],
        // These are keyed as the answers come: from the task to its client, which by snat is an address of this node.
        (REPLY | REPLY_DIRECT, _) => vec![to_client(rewritten.0, rewritten.1), to_task(destination, source)],
        (REPLY_BY_PEER, _) => vec![to_task(destination, source)],
        _ => vec![],
    }
}

fn at<A: Address>(address: A, port: Be16) -> SocketAddr {
    SocketAddr::new(address.to_ip(), port.get())
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use lb_common::{
        flow::Rewrite,
        net::{TCP, V4, V6},
    };

    use super::*;

    const CLIENT: u32 = 100;
    const TASK: u32 = 900;

    /// The ends of one family, as text: client, listener, own address of snat, task.
    const V4_ENDS: [&str; 4] = ["198.51.100.9:40000", "192.0.2.1:80", "192.0.2.1:20000", "172.18.0.3:8080"];
    const V6_ENDS: [&str; 4] =
        ["[2001:db8:9::9]:40000", "[2001:db8::1]:80", "[2001:db8::1]:20000", "[fd18::3]:8080"];

    fn key<A>(from: SocketAddr, to: SocketAddr, narrow: fn(IpAddr) -> A) -> FlowKey<A> {
        FlowKey::new(narrow(from.ip()), narrow(to.ip()), Be16::new(from.port()), Be16::new(to.port()), TCP)
    }

    /// For each role and kind: who is told, in whose name, at which number.
    fn all_are_told<A: Address>(ends: [&str; 4], narrow: fn(IpAddr) -> A) {
        let [client, listener, own, task] = ends.map(|end| end.parse::<SocketAddr>().unwrap());
        let told = |role, kind: Kind, flags, key: FlowKey<A>, source: SocketAddr, destination: SocketAddr| {
            let mut rewrite = Rewrite::default();
            let (from, to) = (narrow(source.ip()), narrow(destination.ip()));
            rewrite.set(&key, (&from, Be16::new(source.port())), (&to, Be16::new(destination.port())));
            let flow = Flow { role, rewrite, client_next: CLIENT, task_next: TASK, ..Flow::default() };
            resets(&key, &flow, &Backend { kind: kind as u8, flags, ..Backend::default() })
        };
        let reset = |from, to, sequence, acknowledgment| Reset { from, to, sequence, acknowledgment };
        let client_told = reset(listener, client, TASK, CLIENT);
        let task_told = reset(client, task, CLIENT, TASK);
        let request = key(client, listener, narrow);
        let answer = key(task, client, narrow);
        for kind in [Kind::Local, Kind::Routed] {
            assert_eq!(told(REQUEST, kind, 0, request, client, task), [client_told, task_told], "{kind:?}");
        }
        let by_snat = [client_told, reset(own, task, CLIENT, TASK)];
        assert_eq!(told(REPLY, Kind::Snat, 0, key(task, own, narrow), listener, client), by_snat);
        assert_eq!(told(REQUEST, Kind::Snat, 0, request, own, task), []);
        // Through the tunnel a packet travels as it came.
        assert_eq!(told(REQUEST, Kind::Peer, 0, request, client, listener), [client_told]);
        assert_eq!(told(REPLY_BY_PEER, Kind::Local, 0, answer, listener, client), [task_told]);
        assert_eq!(told(REQUEST, Kind::Peer, RETURN_DIRECT, request, client, listener), []);
        assert_eq!(told(REPLY_DIRECT, Kind::Local, 0, answer, listener, client), [client_told, task_told]);
    }

    #[test]
    fn each_end_is_told_by_the_node_next_to_it() {
        all_are_told(V4_ENDS, |address| match address {
            IpAddr::V4(address) => V4::from(address),
            IpAddr::V6(_) => panic!("{address}"),
        });
        all_are_told(V6_ENDS, |address| match address {
            IpAddr::V6(address) => V6::from(address),
            IpAddr::V4(_) => panic!("{address}"),
        });
    }
}
