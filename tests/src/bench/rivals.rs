//! What a user would pick instead, set up as its own documentation has it: nftables, iptables, HAProxy, nginx.

use std::{
    fs,
    io::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    process::Stdio,
};

use crate::netns::{Netns, Running, eventually, run};

/// A published port: the address and port that clients use, and where its tasks are.
pub struct Service {
    /// What clients use.
    pub listener: SocketAddrV4,
    /// Where the tasks are.
    pub backends: Vec<SocketAddrV4>,
    /// Whether answers would not come back by themselves, so that the source is to be this node's.
    pub masquerade: bool,
}

/// Destination NAT by nftables, by a hash of the client's address and port.
pub fn nft(netns: &Netns, services: &[Service]) {
    let mut rules = String::new();
    let mut sources = String::new();
    for Service { listener, backends, masquerade } in services {
        let map: Vec<String> = (0..)
            .zip(backends)
            .map(|(number, backend)| format!("{number} : {} . {}", backend.ip(), backend.port()))
            .collect();
        rules += &format!(
            "ip daddr {} tcp dport {} dnat ip to jhash ip saddr . tcp sport mod {} map {{ {} }}\n",
            listener.ip(),
            listener.port(),
            backends.len(),
            map.join(", ")
        );
        if *masquerade {
            for backend in backends {
                sources += &format!("ip daddr {} tcp dport {} masquerade\n", backend.ip(), backend.port());
            }
        }
    }
    let text = format!(
        "table ip bench {{\n\
         chain prerouting {{ type nat hook prerouting priority dstnat; policy accept;\n{rules}}}\n\
         chain postrouting {{ type nat hook postrouting priority srcnat; policy accept;\n{sources}}}\n}}\n"
    );
    let mut nft = netns.command("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("start nft");
    nft.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("write to nft");
    assert!(nft.wait().expect("wait for nft").success(), "nft refuses:\n{text}");
    leave_sums_to_the_card(netns);
}

/// Destination NAT by iptables, a task by chance, as kube-proxy writes it.
pub fn iptables(netns: &Netns, services: &[Service]) {
    for Service { listener, backends, masquerade } in services {
        assert!(!masquerade, "not needed so far");
        for (number, backend) in backends.iter().enumerate() {
            let share = format!("{:.8}", 1.0 / (backends.len() - number) as f64);
            let mut command = netns.command("iptables");
            command.args(["-w", "-t", "nat", "-A", "PREROUTING", "-p", "tcp"]);
            command.args(["-d", &listener.ip().to_string(), "--dport", &listener.port().to_string()]);
            command.args(["-m", "statistic", "--mode", "random", "--probability", &share]);
            command.args(["-j", "DNAT", "--to-destination", &backend.to_string()]);
            run(&mut command);
        }
    }
    leave_sums_to_the_card(netns);
}

/// A network card checks the sums of what comes in; a veth does not, and connection tracking would.
fn leave_sums_to_the_card(netns: &Netns) {
    run(netns.command("sysctl").args(["-qw", "net.netfilter.nf_conntrack_checksum=0"]));
}

/// HAProxy in TCP mode, a thread for each processor, as it is by default.
pub fn haproxy(netns: &Netns, folder: &Path, services: &[Service]) -> Running {
    let mut text = String::from(
        "global\n  maxconn 4000\ndefaults\n  mode tcp\n  balance roundrobin\n  timeout connect 5s\n  \
         timeout client 60s\n  timeout server 60s\n",
    );
    for (number, service) in services.iter().enumerate() {
        text += &format!("listen s{number}\n  bind {}\n", service.listener);
        for (task, backend) in service.backends.iter().enumerate() {
            text += &format!("  server t{task} {backend}\n");
        }
    }
    let path = folder.join("haproxy.cfg");
    fs::write(&path, text).expect("write HAProxy's configuration");
    let mut command = netns.command("haproxy");
    command.args(["-db", "-q", "-f"]).arg(&path);
    started(netns, Running::start(&mut command), services)
}

/// nginx's stream module, a process for each processor.
pub fn nginx_stream(netns: &Netns, folder: &Path, services: &[Service]) -> Running {
    let place = folder.display();
    let mut text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n\
         daemon off; worker_processes auto; pid {place}/stream.pid; error_log {place}/stream.log;\n\
         events {{ worker_connections 4000; }}\nstream {{\n"
    );
    for (number, service) in services.iter().enumerate() {
        let servers: String = service.backends.iter().map(|backend| format!(" server {backend};")).collect();
        text += &format!(
            "upstream s{number} {{{servers} }}\n\
             server {{ listen {} backlog=4096 reuseport; proxy_pass s{number}; }}\n",
            service.listener
        );
    }
    text += "}\n";
    let path = folder.join("stream.conf");
    fs::write(&path, text).expect("write nginx's configuration");
    let mut command = netns.command("nginx");
    command.args(["-e", "/dev/null", "-c"]).arg(&path);
    started(netns, Running::start(&mut command), services)
}

/// nginx as the tasks' web server: a small page, one process for each task; a connection lives as long as the client wants.
pub fn web_server(netns: &Netns, folder: &Path, listeners: &[SocketAddrV4]) -> Running {
    let place = folder.display();
    let listen: String =
        listeners.iter().map(|listener| format!(" listen {listener} backlog=4096;")).collect();
    let text = format!(
        "daemon off; worker_processes {}; pid {place}/web.pid; error_log {place}/web.log;\n\
         events {{ worker_connections 4000; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; client_body_temp_path {place}/body;\n\
         proxy_temp_path {place}/p; fastcgi_temp_path {place}/f; uwsgi_temp_path {place}/u; scgi_temp_path {place}/s;\n\
         server {{{listen} location / {{ return 200 \"hello\\n\"; }} }} }}\n",
        listeners.len()
    );
    let path = folder.join("web.conf");
    fs::write(&path, text).expect("write nginx's configuration");
    let mut command = netns.command("nginx");
    command.args(["-e", "/dev/null", "-c"]).arg(&path);
    let service = Service { listener: listeners[0], backends: vec![], masquerade: false };
    started(netns, Running::start(&mut command), &[service])
}

/// Waits until all ports are open.
fn started(netns: &Netns, mut running: Running, services: &[Service]) -> Running {
    for service in services {
        eventually("a server listens", || {
            assert!(running.is_running(), "a server for {} has ended", service.listener);
            listens(netns, service.listener.port())
        });
    }
    running
}

/// Whether something listens on a TCP port, without a connection to it.
pub fn listens(netns: &Netns, port: u16) -> bool {
    let listening = netns.output("ss", &["-Hltn", &format!("sport = :{port}")]);
    !listening.trim().is_empty()
}

/// Addresses with a port.
pub fn at(port: u16, addresses: impl IntoIterator<Item = Ipv4Addr>) -> Vec<SocketAddrV4> {
    addresses.into_iter().map(|address| SocketAddrV4::new(address, port)).collect()
}
