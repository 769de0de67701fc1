//! Who is to be told by a reset that a connection was given up, for it was idle or its client may no longer connect: the ends next
//! to this node, each by what the line knows of the other.
//!
//! Of a connection through two nodes both have a line with the same timer, and each tells its own end.

use std::net::SocketAddr;

use lb_common::{
    backend::{Backend, Kind, RETURN_DIRECT},
    conntrack::{Line, line::DIRECT},
    net::{Address, Be16},
};

use crate::net::Reset;

/// The resets for an established connection of TCP, as its line was when it was removed. An idle connection's next numbers
/// are what its ends expect.
pub(super) fn resets<A: Address>(line: &Line<A>, backend: &Backend) -> Vec<Reset> {
    let tuple = &line.tuple;
    let client = at(tuple.source, tuple.source_port);
    let listener = at(tuple.destination, tuple.destination_port);
    let to_client =
        Reset { from: listener, to: client, sequence: line.task_next, acknowledgment: line.client_next };
    // The task knows the client by the port that it was given, and with snat by an address of this node.
    let seen_as = |address: A| at(address, line.port);
    let task = at(A::from_wide(backend.address), backend.port);
    let to_task = |from| Reset { from, to: task, sequence: line.client_next, acknowledgment: line.task_next };
    let through_peer = line.peer != 0 && line.link & DIRECT == 0;
    match Kind::try_from(backend.kind) {
        // The task's replies pass elsewhere, so that its number is not known here: its own node tells both ends.
        Ok(Kind::Peer) if backend.flags & RETURN_DIRECT != 0 => vec![],
        Ok(Kind::Peer) => vec![to_client],
        Ok(Kind::Snat) => vec![to_client, to_task(seen_as(A::from_wide(backend.source)))],
        // The other node tells the client.
        Ok(Kind::Local) if through_peer => vec![to_task(seen_as(tuple.source))],
        Ok(Kind::Local | Kind::Routed) => vec![to_client, to_task(seen_as(tuple.source))],
        Err(_) => vec![],
    }
}

fn at<A: Address>(address: A, port: Be16) -> SocketAddr {
    SocketAddr::new(address.to_ip(), port.get())
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use lb_common::{
        conntrack::FiveTuple,
        net::{TCP, V4, V6, wide},
    };

    use super::*;

    const CLIENT: u32 = 100;
    const TASK: u32 = 900;
    /// As the task sees the client's port.
    const PORT: u16 = 41_000;

    /// The ends of one family, as text: client, listener, own address of snat, task.
    const V4_ENDS: [&str; 4] = ["198.51.100.9:40000", "192.0.2.1:80", "192.0.2.1:0", "172.18.0.3:8080"];
    const V6_ENDS: [&str; 4] =
        ["[2001:db8:9::9]:40000", "[2001:db8::1]:80", "[2001:db8::1]:0", "[fd18::3]:8080"];

    /// For each kind and way of the replies: who is told, in whose name, at which number.
    fn all_are_told<A: Address>(ends: [&str; 4], narrow: fn(IpAddr) -> A)
    where
        Line<A>: Default,
    {
        let [client, listener, own, task] = ends.map(|end| end.parse::<SocketAddr>().unwrap());
        let told = |kind: Kind, flags, peer, link| {
            let line = Line {
                tuple: FiveTuple::new(
                    narrow(client.ip()),
                    narrow(listener.ip()),
                    Be16::new(client.port()),
                    Be16::new(listener.port()),
                    TCP,
                ),
                client_next: CLIENT,
                task_next: TASK,
                port: Be16::new(PORT),
                peer,
                link,
                ..Line::default()
            };
            let backend = Backend {
                kind: kind as u8,
                flags,
                address: wide(task.ip()),
                port: Be16::new(task.port()),
                source: wide(own.ip()),
                ..Backend::default()
            };
            resets(&line, &backend)
        };
        let reset = |from, to, sequence, acknowledgment| Reset { from, to, sequence, acknowledgment };
        let client_told = reset(listener, client, TASK, CLIENT);
        let task_told = reset(SocketAddr::new(client.ip(), PORT), task, CLIENT, TASK);
        for kind in [Kind::Local, Kind::Routed] {
            assert_eq!(told(kind, 0, 0, 0), [client_told, task_told], "{kind:?}");
        }
        let by_snat = [client_told, reset(SocketAddr::new(own.ip(), PORT), task, CLIENT, TASK)];
        assert_eq!(told(Kind::Snat, 0, 0, 0), by_snat);
        // Through the tunnel each node tells the end next to it.
        assert_eq!(told(Kind::Peer, 0, 0, 0), [client_told]);
        assert_eq!(told(Kind::Local, 0, 7, 0), [task_told]);
        assert_eq!(told(Kind::Peer, RETURN_DIRECT, 0, 0), []);
        assert_eq!(told(Kind::Local, 0, 7, DIRECT), [client_told, task_told]);
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
