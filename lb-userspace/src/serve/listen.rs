//! Where it is served: an address, or a socket in the file system; a few connections at once, none of them for ever.

use std::{
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use axum::Router;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

/// So many connections are served at once.
const CONNECTIONS: usize = 64;
/// A request's head comes within this time, or the connection ends.
const HEAD: Duration = Duration::from_secs(10);
/// A whole request has this time, its answer included.
const WHOLE: Duration = Duration::from_secs(60);
/// After a failure to accept (too many open files) so long is waited.
const PAUSE: Duration = Duration::from_millis(100);

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// An address and a port.
    Tcp(SocketAddr),
    /// A socket in the file system, for the owner alone.
    Unix(PathBuf),
    /// Nowhere.
    Nowhere,
}

impl Default for Listen {
    fn default() -> Self {
        Self::Tcp(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 9464))
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| {
            text.parse::<u16>().ok().map(|port| SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))
        };
        match text {
            "none" => return Ok(Self::Nowhere),
            path if path.starts_with('/') => return Ok(Self::Unix(path.into())),
            _ => {}
        }
        if let Some(path) = text.strip_prefix("unix:").filter(|path| path.starts_with('/')) {
            return Ok(Self::Unix(path.into()));
        }
        let address = text.parse().ok().or_else(|| port(text.strip_prefix(':')?));
        address.map(Self::Tcp).ok_or_else(|| {
            format!("{text:?} is nothing to listen on; write 127.0.0.1:9464, [::1]:9464, :9464 for all addresses, unix:/PATH or none")
        })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Nowhere => f.write_str("none"),
        }
    }
}

impl Listen {
    /// Whether only programs of this machine get there.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) | Self::Nowhere => true,
        }
    }
}

/// Whether it could be listened there. That somebody listens already is no reason: it may be this very agent.
///
/// # Errors
/// The address is none of this machine's, or the system refuses it.
pub fn could_listen(at: &Listen) -> io::Result<()> {
    let Listen::Tcp(address) = at else {
        return Ok(());
    };
    match std::net::TcpListener::bind(address) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => Err(error),
        _ => Ok(()),
    }
}

/// Serves until it is dropped with the runtime.
///
/// # Errors
/// It cannot be listened there.
pub fn listen(at: &Listen, router: Router) -> io::Result<()> {
    match at {
        Listen::Nowhere => {}
        Listen::Tcp(address) => {
            let socket =
                socket2::Socket::new(socket2::Domain::for_address(*address), socket2::Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.set_nonblocking(true)?;
            if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
                socket.set_only_v6(false)?;
            }
            socket.bind(&(*address).into())?;
            socket.listen(128)?;
            let listener = TcpListener::from_std(socket.into())?;
            tokio::spawn(serve(async move || listener.accept().await.map(|(stream, _)| stream), router));
        }
        Listen::Unix(path) => {
            // One that an agent has left, whose end nobody listens at any more.
            if fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
                && std::os::unix::net::UnixStream::connect(path).is_err()
            {
                fs::remove_file(path)?;
            }
            let listener = UnixListener::bind(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
            tokio::spawn(serve(async move || listener.accept().await.map(|(stream, _)| stream), router));
        }
    }
    Ok(())
}

async fn serve<S>(accept: impl AsyncFn() -> io::Result<S>, router: Router)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let stream = match accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!("accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let mut http = hyper::server::conn::http1::Builder::new();
            http.keep_alive(false).timer(TokioTimer::new()).header_read_timeout(HEAD);
            // Who goes away early has what it wanted; who does not read must not hold a place for ever.
            let served = http.serve_connection(TokioIo::new(stream), service);
            let _ = tokio::time::timeout(WHOLE, served).await;
            drop(permit);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_nonsense_is_refused() {
        let read = |text: &str| text.parse::<Listen>().map(|listen| listen.to_string());
        assert_eq!(read("127.0.0.1:9464"), Ok("http://127.0.0.1:9464".into()));
        assert_eq!(read(":80"), Ok("http://[::]:80".into()));
        assert_eq!(read("[::1]:80"), Ok("http://[::1]:80".into()));
        assert_eq!(read("/run/lb.sock"), Ok("unix:/run/lb.sock".into()));
        assert_eq!(read("unix:/run/lb.sock"), Ok("unix:/run/lb.sock".into()));
        assert_eq!(read("none"), Ok("none".into()));
        for bad in ["", "localhost", "127.0.0.1", "unix:x", "9464", ":"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert!(Listen::default().is_local() && !":80".parse::<Listen>().unwrap().is_local());
    }
}
