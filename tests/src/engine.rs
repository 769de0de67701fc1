//! A stand-in for the Engine API of a manager of a large swarm: as many services, nodes and tasks as are asked for, in
//! Docker's own JSON. Lists are written as they are made, so that this takes no room for them.

use std::{
    io::{self, BufRead as _, BufReader, BufWriter, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

/// How large the swarm is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Nodes; the engine is the first one's.
    pub nodes: usize,
    /// Services with a published port each.
    pub services: usize,
    /// Tasks, the same number for each service.
    pub tasks: usize,
}

/// The port that the first service publishes; the others follow.
pub const FIRST_PORT: usize = 10_000;

/// The engine. It ends with the program.
pub struct Engine {
    size: Size,
    path: PathBuf,
    /// Whether the first task runs.
    first_runs: AtomicBool,
    /// Answers that were given, and their bytes.
    answers: AtomicU64,
    bytes: AtomicU64,
}

impl Engine {
    /// Serves on a socket.
    ///
    /// # Panics
    /// The socket cannot be made.
    pub fn serve(path: &Path, size: Size) -> Arc<Self> {
        let listener = UnixListener::bind(path).expect("make the engine's socket");
        let engine = Arc::new(Self {
            size,
            path: path.to_owned(),
            first_runs: AtomicBool::new(true),
            answers: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        let serving = engine.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let engine = serving.clone();
                // Whoever hangs up in the middle is not our concern.
                thread::spawn(move || drop(engine.answer(stream)));
            }
        });
        engine
    }

    /// As `DOCKER_HOST` has it.
    pub fn docker_host(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Has the first task of the first service end, or run again.
    pub fn set_first_runs(&self, runs: bool) {
        self.first_runs.store(runs, Ordering::Relaxed);
    }

    /// Answers and bytes so far.
    pub fn traffic(&self) -> (u64, u64) {
        (self.answers.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }

    fn answer(&self, stream: UnixStream) -> io::Result<()> {
        let mut requests = BufReader::new(stream.try_clone()?);
        loop {
            let mut line = String::new();
            if requests.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
            while line.trim() != "" {
                line.clear();
                requests.read_line(&mut line)?;
            }
            let mut out = Chunked { out: BufWriter::with_capacity(1 << 16, &stream), sent: 0 };
            out.head()?;
            let path = path
                .split_once("/v1.")
                .map_or(path.as_str(), |(_, rest)| &rest[rest.find('/').unwrap_or(0)..]);
            if path.starts_with("/events") {
                out.out.flush()?;
                // There are no events of tasks (moby#37403), and nothing else happens here.
                let _ = requests.read_line(&mut line);
                return Ok(());
            }
            let mut body = BufWriter::with_capacity(1 << 16, out);
            self.write(path, &mut body)?;
            let sent = body.into_inner().map_err(io::IntoInnerError::into_error)?.end()?;
            self.answers.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(sent, Ordering::Relaxed);
        }
    }

    fn write(&self, path: &str, out: &mut impl Write) -> io::Result<()> {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        match path {
            "/version" => write!(out, r#"{{"ApiVersion":"1.41","MinAPIVersion":"1.12"}}"#),
            "/swarm" => write!(out, "{{}}"),
            "/info" => write!(
                out,
                r#"{{"DockerRootDir":"/nowhere","Swarm":{{"NodeID":"{}","NodeAddr":"{}","LocalNodeState":"active","ControlAvailable":true,"RemoteManagers":[{{"NodeID":"{}","Addr":"{}:2377"}}],"Cluster":{{"ID":"cluster"}}}}}}"#,
                node_id(0),
                address(0),
                node_id(0),
                address(0)
            ),
            "/services" => list(out, self.size.services, service),
            "/nodes" => list(out, self.size.nodes, node),
            "/tasks" => {
                let runs = self.first_runs.load(Ordering::Relaxed);
                let wanted = query.contains("running");
                list(out, self.size.tasks - usize::from(!runs && wanted), |index, out| {
                    let index = index + usize::from(!runs && wanted);
                    task(&self.size, index, index > 0 || runs, out)
                })
            }
            "/networks" => write!(out, r#"[{{"Id":"ingress","Ingress":true}}]"#),
            "/containers/json" => write!(out, "[]"),
            _ if path.starts_with("/networks/") => {
                write!(out, r#"{{"Services":{{}},"Peers":["#)?;
                for index in 0..self.size.nodes {
                    write!(out, r#"{}{{"IP":"{}"}}"#, comma(index), address(index))?;
                }
                write!(out, "]}}")
            }
            _ if path.starts_with("/tasks/") => {
                task(&self.size, 0, self.first_runs.load(Ordering::Relaxed), out)
            }
            _ => write!(out, "{{}}"),
        }
    }
}

fn list<W: Write>(
    out: &mut W,
    count: usize,
    mut entry: impl FnMut(usize, &mut W) -> io::Result<()>,
) -> io::Result<()> {
    write!(out, "[")?;
    for index in 0..count {
        write!(out, "{}", comma(index))?;
        entry(index, out)?;
    }
    write!(out, "]")
}

fn comma(index: usize) -> &'static str {
    if index == 0 { "" } else { "," }
}

fn node_id(index: usize) -> String {
    format!("node{index:021}")
}

/// Of a node; the first one's is that of the machine of the tests.
fn address(index: usize) -> String {
    let number = index + 101;
    format!(
        "192.{}.{}.{}",
        if index == 0 { 0 } else { 20 + number / 65_536 },
        if index == 0 { 2 } else { number / 256 % 256 },
        number % 256
    )
}

const TIMES: &str =
    r#""CreatedAt":"2026-11-25T13:22:04.332660173Z","UpdatedAt":"2026-11-25T13:22:06.512345678Z""#;

fn service(index: usize, out: &mut impl Write) -> io::Result<()> {
    let port = FIRST_PORT + index;
    let ports =
        format!(r#"[{{"Protocol":"tcp","TargetPort":8080,"PublishedPort":{port},"PublishMode":"ingress"}}]"#);
    write!(
        out,
        r#"{{"ID":"service{index:018}","Version":{{"Index":{index}}},{TIMES},"Spec":{{"Name":"service-{index}","Labels":{{"com.docker.stack.namespace":"stack"}},"TaskTemplate":{{"ContainerSpec":{{"Image":"registry.example.com/team/application:1.2.3@sha256:{index:064}","Isolation":"default"}},"RestartPolicy":{{"Condition":"any","Delay":5000000000,"MaxAttempts":0}},"ForceUpdate":0,"Runtime":"container"}},"Mode":{{"Replicated":{{"Replicas":10}}}},"EndpointSpec":{{"Mode":"vip","Ports":{ports}}}}},"Endpoint":{{"Spec":{{"Mode":"vip","Ports":{ports}}},"Ports":{ports},"VirtualIPs":[{{"NetworkID":"ingress","Addr":"10.0.0.2/8"}}]}}}}"#
    )
}

fn node(index: usize, out: &mut impl Write) -> io::Result<()> {
    let manager = if index == 0 {
        format!(
            r#","ManagerStatus":{{"Leader":true,"Reachability":"reachable","Addr":"{}:2377"}}"#,
            address(0)
        )
    } else {
        String::new()
    };
    write!(
        out,
        r#"{{"ID":"{}",{TIMES},"Spec":{{"Labels":{{}},"Role":"worker","Availability":"active"}},"Description":{{"Hostname":"host-{index}","Platform":{{"Architecture":"x86_64","OS":"linux"}},"Resources":{{"NanoCPUs":8000000000,"MemoryBytes":33000000000}},"Engine":{{"EngineVersion":"26.1.5","Plugins":[{{"Type":"Log","Name":"json-file"}},{{"Type":"Network","Name":"overlay"}},{{"Type":"Volume","Name":"local"}}]}},"TLSInfo":{{"TrustRoot":"{:0400}","CertIssuerSubject":"MBMxETAPBgNVBAMTCHN3YXJtLWNh","CertIssuerPublicKey":"{:0120}"}}}},"Status":{{"State":"ready","Addr":"{}"}}{manager}}}"#,
        node_id(index),
        0,
        0,
        address(index)
    )
}

/// A task as Docker 26 writes one of a service with a network of its own beside the routing mesh's.
fn task(size: &Size, index: usize, runs: bool, out: &mut impl Write) -> io::Result<()> {
    let each = (size.tasks / size.services).max(1);
    let (service, slot) = (index / each, index % each + 1);
    let (desired, state) = if runs { ("running", "running") } else { ("shutdown", "shutdown") };
    let network = |id: &str, ingress: bool, first: u8| {
        let number = index + 3;
        format!(
            r#"{{"Network":{{"ID":"{id}","Version":{{"Index":11}},{TIMES},"Spec":{{"Name":"{id}","Labels":{{}},"DriverConfiguration":{{}},"Ingress":{ingress},"IPAMOptions":{{"Driver":{{}},"Configs":[{{"Subnet":"{first}.0.0.0/8","Gateway":"{first}.0.0.1"}}]}},"Scope":"swarm"}},"DriverState":{{"Name":"overlay","Options":{{"com.docker.network.driver.overlay.vxlanid_list":"4096"}}}},"IPAMOptions":{{"Driver":{{"Name":"default"}},"Configs":[{{"Subnet":"{first}.0.0.0/8","Gateway":"{first}.0.0.1"}}]}}}},"Addresses":["{first}.{}.{}.{}/8"]}}"#,
            number / 65_536 + 1,
            number / 256 % 256,
            number % 256
        )
    };
    write!(
        out,
        r#"{{"ID":"task{index:021}","Version":{{"Index":{index}}},{TIMES},"Labels":{{}},"Spec":{{"ContainerSpec":{{"Image":"registry.example.com/team/application:1.2.3@sha256:{service:064}","Labels":{{"com.docker.stack.namespace":"stack"}},"Env":["A=1","B=two","C=three"],"Isolation":"default"}},"Resources":{{"Limits":{{}},"Reservations":{{}}}},"RestartPolicy":{{"Condition":"any","Delay":5000000000,"MaxAttempts":0}},"Networks":[{{"Target":"backend"}}],"ForceUpdate":0}},"ServiceID":"service{service:018}","Slot":{slot},"NodeID":"{}","Status":{{"Timestamp":"2026-11-25T13:22:06.512345678Z","State":"{state}","Message":"started","ContainerStatus":{{"ContainerID":"{index:064}","PID":4711,"ExitCode":0}},"PortStatus":{{}}}},"DesiredState":"{desired}","NetworksAttachments":[{},{}],"Volumes":null}}"#,
        node_id(index % size.nodes),
        network("ingress", true, 10),
        network("backend", false, 11),
    )
}

/// HTTP's chunks.
struct Chunked<W: Write> {
    out: BufWriter<W>,
    sent: u64,
}

impl<W: Write> Chunked<W> {
    fn head(&mut self) -> io::Result<()> {
        self.out.write_all(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
        )
    }

    fn end(mut self) -> io::Result<u64> {
        self.out.write_all(b"0\r\n\r\n")?;
        self.out.flush()?;
        Ok(self.sent)
    }
}

impl<W: Write> Write for Chunked<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // An empty chunk would be the end.
        if !bytes.is_empty() {
            write!(self.out, "{:x}\r\n", bytes.len())?;
            self.out.write_all(bytes)?;
            self.out.write_all(b"\r\n")?;
            self.sent += bytes.len() as u64;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
