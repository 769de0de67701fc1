//! A client of Docker's Engine API: as much of it as the source asks for, and what it is not sure of stays text.
//!
//! A generated client refuses a whole list for one word that it does not know; this one does not, because a newer
//! Docker has newer words.

use std::{
    env, fmt, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1,
    header::HOST,
};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    process::Command,
};

/// The oldest version with all that is asked for, from Docker 20.10: spoken where the engine still knows it.
const VERSION: (u32, u32) = (1, 41);
/// Answers come at once or not at all.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the engine was not understood.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// `DOCKER_HOST` or its companions say nothing useful.
    #[error("{0}")]
    Host(String),
    /// There is nobody.
    #[error("{}", unreachable(.host, .source))]
    Connect {
        /// Where.
        host: String,
        /// The kernel's or the library's words.
        source: io::Error,
    },
    /// The connection broke.
    #[error("ask Docker for {path}: {source}")]
    Http {
        /// What was asked for.
        path: String,
        /// The library's words.
        source: hyper::Error,
    },
    /// It refused.
    #[error("Docker answers {status} to {path}: {message}")]
    Refused {
        /// What was asked for.
        path: String,
        /// HTTP status.
        status: u16,
        /// The engine's words.
        message: String,
    },
    /// It does not answer.
    #[error("Docker does not answer {path} within {} s", PATIENCE.as_secs())]
    Late {
        /// What was asked for.
        path: String,
    },
    /// The answer is not what was asked for.
    #[error("Docker's answer to {path} is not understood: {source}")]
    Decode {
        /// What was asked for.
        path: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// Why Docker cannot be talked to, and what to do.
fn unreachable(host: &str, source: &io::Error) -> String {
    let advice = match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused if host.starts_with("unix:") => {
            return format!(
                "Docker is not running at {host} ({source}); it is asked again every second. `systemctl start docker` starts it; \
                 without Docker: --cluster FILE"
            );
        }
        io::ErrorKind::PermissionDenied => "; this needs root, or the group docker",
        _ => "",
    };
    format!("connect to Docker at {host}: {source}{advice}")
}

impl EngineError {
    /// The HTTP status, if the engine answered with one that is no success.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// Where the engine listens.
#[derive(Clone)]
enum Host {
    Unix(PathBuf),
    Tcp(String, Option<Arc<rustls::ClientConfig>>),
    /// Destination and port, as ssh takes them.
    Ssh(String, Option<String>),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address, _) => write!(f, "tcp://{address}"),
            Self::Ssh(destination, None) => write!(f, "ssh://{destination}"),
            Self::Ssh(destination, Some(port)) => write!(f, "ssh://{destination}:{port}"),
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The engine of this machine, or of another that `DOCKER_HOST` names.
#[derive(Clone)]
pub struct Engine {
    host: Host,
    /// `v1.41`, once it was agreed on.
    version: Arc<Mutex<Option<String>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Version {
    api_version: String,
    #[serde(rename = "MinAPIVersion", default)]
    min_api_version: String,
}

#[derive(Deserialize)]
struct Refusal {
    message: String,
}

impl Engine {
    /// The engine that the environment names as Docker's own client reads it: `DOCKER_HOST`, `DOCKER_TLS`,
    /// `DOCKER_TLS_VERIFY`, `DOCKER_CERT_PATH`; without them the local socket. With TLS the engine's certificate is verified
    /// in any case.
    ///
    /// # Errors
    /// They name nothing that can be connected to.
    pub fn from_environment() -> Result<Self, EngineError> {
        let host = env::var("DOCKER_HOST").unwrap_or_default();
        let set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
        let certificates = env::var_os("DOCKER_CERT_PATH").map(PathBuf::from);
        Self::at(&host, set("DOCKER_TLS_VERIFY") || set("DOCKER_TLS"), certificates.as_deref())
    }

    fn at(host: &str, verify: bool, certificates: Option<&Path>) -> Result<Self, EngineError> {
        let host = match host.split_once("://") {
            None if host.is_empty() => Host::Unix("/var/run/docker.sock".into()),
            Some(("unix", path)) => Host::Unix(path.into()),
            Some(("tcp", address)) => {
                let address = address.trim_end_matches('/');
                let port = if verify { 2376 } else { 2375 };
                let has_port = address.rsplit(':').next().is_some_and(|port| port.parse::<u16>().is_ok());
                let address = if has_port { address.to_owned() } else { format!("{address}:{port}") };
                Host::Tcp(address, verify.then(|| tls(certificates)).transpose()?)
            }
            Some(("ssh", destination)) => match destination.rsplit_once(':') {
                Some((destination, port)) => Host::Ssh(destination.into(), Some(port.into())),
                None => Host::Ssh(destination.into(), None),
            },
            Some(("http" | "https", address)) => {
                let address = address.trim_end_matches('/');
                return Err(EngineError::Host(format!(
                    "DOCKER_HOST={host:?} is not understood, as it is not by Docker's own client: write tcp://{address}, and for \
                     TLS set DOCKER_TLS_VERIFY=1 besides"
                )));
            }
            _ => {
                return Err(EngineError::Host(format!(
                    "DOCKER_HOST={host:?} is not understood; it may be unix://PATH, tcp://HOST:PORT or ssh://USER@HOST"
                )));
            }
        };
        Ok(Self { host, version: Arc::default() })
    }

    /// Where it is.
    pub fn place(&self) -> String {
        self.host.to_string()
    }

    /// What the operator should hear of the way to it.
    pub fn warning(&self) -> Option<String> {
        let Host::Tcp(address, None) = &self.host else {
            return None;
        };
        Some(format!(
            "Docker at tcp://{address} is asked without TLS: whoever is on the way reads and changes what it says, and whoever \
             reaches that port is root there; set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH, or use ssh:// or the local socket"
        ))
    }

    async fn connect(&self) -> Result<Box<dyn Stream>, EngineError> {
        let error = |source| EngineError::Connect { host: self.place(), source };
        Ok(match &self.host {
            Host::Unix(path) => Box::new(UnixStream::connect(path).await.map_err(error)?),
            Host::Tcp(address, None) => Box::new(TcpStream::connect(address).await.map_err(error)?),
            Host::Tcp(address, Some(config)) => {
                let stream = TcpStream::connect(address).await.map_err(error)?;
                let name = address.rsplit_once(':').map_or(address.as_str(), |(name, _)| name);
                let name = ServerName::try_from(name.trim_matches(['[', ']']).to_owned());
                let name = name.map_err(|source| error(io::Error::other(source)))?;
                let connector = tokio_rustls::TlsConnector::from(config.clone());
                Box::new(connector.connect(name, stream).await.map_err(error)?)
            }
            Host::Ssh(destination, port) => {
                let mut command = Command::new("ssh");
                command.args(["-o", "ConnectTimeout=10", "-T"]);
                if let Some(port) = port {
                    command.args(["-p", port]);
                }
                command.args(["--", destination, "docker", "system", "dial-stdio"]);
                command
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::inherit())
                    .kill_on_drop(true);
                let mut child = command.spawn().map_err(error)?;
                let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
                    return Err(error(io::ErrorKind::BrokenPipe.into()));
                };
                tokio::spawn(async move { child.wait().await });
                Box::new(tokio::io::join(output, input))
            }
        })
    }

    async fn send(&self, path: &str) -> Result<Response<Incoming>, EngineError> {
        let http = |source| EngineError::Http { path: path.to_owned(), source };
        let stream = self.connect().await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        tokio::spawn(connection);
        let request = Request::get(path).header(HOST, "docker").body(Empty::<Bytes>::new());
        let request = request.map_err(|error| EngineError::Host(format!("{path:?}: {error}")))?;
        let response = sender.send_request(request).await.map_err(http)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.map_err(http)?.to_bytes();
        let message = serde_json::from_slice::<Refusal>(&body).map(|refusal| refusal.message);
        let message = message.unwrap_or_else(|_| String::from_utf8_lossy(&body).trim().to_owned());
        Err(EngineError::Refused { path: path.to_owned(), status, message })
    }

    async fn raw<T: DeserializeOwned>(&self, path: &str) -> Result<T, EngineError> {
        let read = async {
            let response = self.send(path).await?;
            let body = response.into_body().collect().await;
            body.map_err(|source| EngineError::Http { path: path.to_owned(), source })
        };
        let body = tokio::time::timeout(PATIENCE, read).await;
        let body = body.map_err(|_| EngineError::Late { path: path.to_owned() })??.to_bytes();
        serde_json::from_slice(&body).map_err(|source| EngineError::Decode { path: path.to_owned(), source })
    }

    fn agreed(&self) -> MutexGuard<'_, Option<String>> {
        self.version.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The version to speak: ours where the engine knows it, else its nearest.
    async fn version(&self) -> Result<String, EngineError> {
        let known = self.agreed().clone();
        if let Some(known) = known {
            return Ok(known);
        }
        let theirs: Version = self.raw("/version").await?;
        let newest = number(&theirs.api_version).unwrap_or(VERSION);
        let oldest = number(&theirs.min_api_version).unwrap_or(VERSION);
        let (major, minor) = VERSION.min(newest).max(oldest);
        let version = format!("v{major}.{minor}");
        *self.agreed() = Some(version.clone());
        Ok(version)
    }

    /// Another engine may be there next time, which asks for another version.
    fn doubt<T>(&self, answer: Result<T, EngineError>) -> Result<T, EngineError> {
        if let Err(EngineError::Connect { .. } | EngineError::Refused { status: 400, .. }) = &answer {
            *self.agreed() = None;
        }
        answer
    }

    /// Asks for something.
    ///
    /// # Errors
    /// The engine is not there, refuses, or answers something else.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, EngineError> {
        let path = format!("/{}{path}", self.version().await?);
        self.doubt(self.raw(&path).await)
    }

    /// Asks for a list. What is not understood of it is left out and named, the rest stands.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn list<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>, EngineError> {
        Ok(entries(path, self.get(path).await?))
    }

    /// Follows events; each that is heard, whatever it says, is news.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn events(&self, filters: &str) -> Result<Events, EngineError> {
        let path = format!("/{}/events?filters={}", self.version().await?, encode(filters));
        let send = tokio::time::timeout(PATIENCE, self.send(&path));
        let response = self.doubt(send.await.map_err(|_| EngineError::Late { path: path.clone() })?)?;
        Ok(Events { body: response.into_body() })
    }
}

/// What is understood of a list.
pub(super) fn entries<T: DeserializeOwned>(path: &str, raw: Option<Vec<Box<RawValue>>>) -> Vec<T> {
    let items = raw.unwrap_or_default().into_iter().filter_map(|item| {
        let decoded = serde_json::from_str(item.get());
        decoded.inspect_err(|error| log::warn!("an entry of {path} is left out: {error}")).ok()
    });
    items.collect()
}

/// A stream of events.
pub struct Events {
    body: Incoming,
}

impl Events {
    /// Waits for some; false when there will be no more.
    pub async fn next(&mut self) -> bool {
        matches!(self.body.frame().await, Some(Ok(_)))
    }
}

fn number(version: &str) -> Option<(u32, u32)> {
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Percent-encodes a query's value (RFC 3986, 2).
pub fn encode(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(byte.into()),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// The client's side of TLS as `docker --tlsverify` has it.
fn tls(certificates: Option<&Path>) -> Result<Arc<rustls::ClientConfig>, EngineError> {
    let home = || env::var_os("HOME").map(|home| Path::new(&home).join(".docker"));
    let folder = certificates.map(Path::to_owned).or_else(home).unwrap_or_default();
    let file = |name: &str| folder.join(name);
    let error = |name: &str, reason: String| {
        EngineError::Host(format!("{}: {reason}; DOCKER_CERT_PATH names its folder", file(name).display()))
    };
    let chain = |name: &str| {
        let read = CertificateDer::pem_file_iter(file(name)).and_then(Iterator::collect);
        read.map_err(|reason| error(name, reason.to_string()))
    };
    let mut roots = rustls::RootCertStore::empty();
    let authorities: Vec<CertificateDer<'static>> = chain("ca.pem")?;
    roots.add_parsable_certificates(authorities);
    let key = PrivateKeyDer::from_pem_file(file("key.pem")).map_err(|e| error("key.pem", e.to_string()))?;
    let config =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|builder| {
                builder
                    .with_root_certificates(roots)
                    .with_client_auth_cert(chain("cert.pem").unwrap_or_default(), key)
            });
    config.map(Arc::new).map_err(|reason| error("cert.pem", reason.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(host: &str) -> String {
        Engine::at(host, false, None).map_or_else(|error| error.to_string(), |engine| engine.place())
    }

    #[test]
    fn docker_host_is_read_as_docker_reads_it() {
        assert_eq!(place(""), "unix:///var/run/docker.sock");
        assert_eq!(place("unix:///run/other.sock"), "unix:///run/other.sock");
        assert_eq!(place("tcp://192.0.2.1"), "tcp://192.0.2.1:2375");
        assert_eq!(place("tcp://192.0.2.1:4243/"), "tcp://192.0.2.1:4243");
        assert_eq!(place("ssh://me@node1:2222"), "ssh://me@node1:2222");
        assert!(place("node1").contains("is not understood"), "{}", place("node1"));
        let error =
            Engine::at("tcp://192.0.2.1", true, Some(Path::new("/nowhere"))).err().unwrap().to_string();
        assert!(error.contains("/nowhere/ca.pem") && error.contains("DOCKER_CERT_PATH"), "{error}");
    }

    /// What looks like TLS is never plain, and what is plain is said.
    #[test]
    fn plain_connections_are_said_and_those_that_look_safe_refused() {
        for (host, instead) in [
            ("https://node1:2376", "write tcp://node1:2376,"),
            ("http://192.0.2.1/", "write tcp://192.0.2.1,"),
        ] {
            let refused = place(host);
            assert!(refused.contains(instead) && refused.contains("DOCKER_TLS_VERIFY=1"), "{refused}");
        }
        let warning = |host: &str| Engine::at(host, false, None).ok().unwrap().warning();
        assert!(
            warning("tcp://192.0.2.1")
                .unwrap()
                .starts_with("Docker at tcp://192.0.2.1:2375 is asked without TLS")
        );
        assert_eq!(
            [warning(""), warning("unix:///run/docker.sock"), warning("ssh://node1")],
            [None, None, None]
        );
    }

    #[test]
    fn queries_are_encoded() {
        assert_eq!(encode(r#"{"type":["node"]}"#), "%7B%22type%22%3A%5B%22node%22%5D%7D");
    }
}
