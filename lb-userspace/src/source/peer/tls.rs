//! Who may talk to whom: the certificates that Swarm gives every node, and keeps fresh.
//!
//! Organisation is the cluster, organisational unit the role, common name the node; the role stands among the names
//! too. They rotate while Swarm runs, so that they are read anew when they have changed.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _, x509::AttributeTypeAndValue};

/// Organisational unit of a manager's certificate, and a name in it.
pub const MANAGER: &str = "swarm-manager";
/// Organisational unit of a worker's certificate.
pub const WORKER: &str = "swarm-worker";

/// Why there can be no trust.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of Swarm's cannot be read.
    #[error("read {path}, by which the nodes of a swarm know each other: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's words.
        source: io::Error,
    },
    /// A file of Swarm's is not what it should be.
    #[error("{path} is no use for TLS: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The private key is locked.
    #[error(
        "{0} is encrypted: the swarm's managers are locked (autolock), and the agents of managers cannot prove who they \
         are; `docker swarm update --autolock=false` lets workers have their state"
    )]
    Locked(PathBuf),
    /// Somebody's certificate is not of this swarm.
    #[error("{0}")]
    Stranger(String),
}

/// Whom a certificate names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The swarm.
    pub cluster: String,
    /// [`MANAGER`] or [`WORKER`].
    pub role: String,
    /// The node's identifier.
    pub node: String,
    /// Until when it is so.
    pub until: SystemTime,
}

/// What this node proves itself with.
pub struct Identity {
    /// This node.
    pub own: Member,
    /// For connecting to a manager.
    pub client: Arc<ClientConfig>,
    /// For being connected to by nodes of the swarm.
    pub server: Arc<ServerConfig>,
}

/// The files by which nodes know each other, in the order in which they are read.
const FILES: [&str; 3] = ["swarm-node.crt", "swarm-node.key", "swarm-root-ca.crt"];

fn folder(root: &Path) -> PathBuf {
    root.join("swarm/certificates")
}

/// What tells a file from what it was.
type Stamp = Option<(u64, u64, i64, i64)>;

/// What this node proves itself with, read again when the files have changed.
pub struct Keeper {
    root: PathBuf,
    known: Mutex<Option<([Stamp; 3], Arc<Identity>)>>,
}

impl Keeper {
    /// Of the node whose Docker has this root directory.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), known: Mutex::default() }
    }

    /// Docker's root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// As the files are now.
    ///
    /// # Errors
    /// One is missing, is no certificate or key, or is locked.
    pub fn identity(&self) -> Result<Arc<Identity>, TlsError> {
        let folder = folder(&self.root);
        let stamps = FILES.map(|name| {
            let file = fs::metadata(folder.join(name)).ok()?;
            Some((file.ino(), file.size(), file.ctime(), file.ctime_nsec()))
        });
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, identity)) = &*known
            && *of == stamps
        {
            return Ok(identity.clone());
        }
        *known = None;
        let identity = Arc::new(Identity::load(&self.root)?);
        // The clock of files is coarse: one that was written just now may be written again without looking different.
        let settled = stamps.iter().flatten().all(|(.., seconds, nanoseconds)| {
            let changed = Duration::new((*seconds).max(0) as u64, *nanoseconds as u32);
            (SystemTime::UNIX_EPOCH + changed).elapsed().is_ok_and(|age| age > Duration::from_secs(1))
        });
        *known = settled.then(|| (stamps, identity.clone()));
        Ok(identity)
    }
}

impl Identity {
    /// Reads the files as they are now, from Docker's root directory.
    ///
    /// # Errors
    /// One is missing, is no certificate or key, or is locked.
    fn load(root: &Path) -> Result<Self, TlsError> {
        let folder = folder(root);
        let read = |name: &str| {
            let path = folder.join(name);
            let text = fs::read_to_string(&path);
            text.map(|text| (path.clone(), text)).map_err(|source| TlsError::Read { path, source })
        };
        let certificates = |(path, text): &(PathBuf, String)| {
            let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
            match parsed {
                Ok(chain) if !chain.is_empty() => Ok(chain),
                Ok(_) => Err(invalid(path, "it holds no certificate")),
                Err(error) => Err(invalid(path, error)),
            }
        };
        let certificate = read(FILES[0])?;
        let chain = certificates(&certificate)?;
        let own = member(&chain[0]).map_err(|reason| invalid(&certificate.0, reason))?;
        let (path, text) = read(FILES[1])?;
        if text.contains("ENCRYPTED") {
            return Err(TlsError::Locked(path));
        }
        // Swarm keeps headers of its own in it, as RFC 1421 has them; nobody else reads those.
        let plain: String =
            text.lines().filter(|line| !line.contains(':')).map(|l| format!("{l}\n")).collect();
        let key = PrivateKeyDer::from_pem_slice(plain.as_bytes()).map_err(|error| invalid(&path, error))?;
        let authorities = read(FILES[2])?;
        let mut roots = RootCertStore::empty();
        for authority in certificates(&authorities)? {
            roots.add(authority).map_err(|error| invalid(&authorities.0, error))?;
        }
        let (provider, roots) = (Arc::new(rustls::crypto::ring::default_provider()), Arc::new(roots));
        let useless = |error: rustls::Error| invalid(&folder, error);
        let client = client(&provider, &roots, (chain.clone(), key.clone_key())).map_err(useless)?;
        let server = server(&provider, &roots, (chain, key)).map_err(useless)?;
        Ok(Self { own, client, server })
    }
}

type Own = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn client(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    (chain, key): Own,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain, key)?;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn server(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    (chain, key): Own,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
    let verifier = verifier.map_err(|error| rustls::Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    // Each connection shows its certificate: a session that is taken up again would be believed by what it showed once.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn invalid(path: &Path, reason: impl ToString) -> TlsError {
    TlsError::Invalid { path: path.to_owned(), reason: reason.to_string() }
}

/// The name that every manager's certificate has.
pub fn manager_name() -> ServerName<'static> {
    ServerName::try_from(MANAGER).expect("a constant that is a name")
}

/// Whom the other side's certificate names, checked to be of the same swarm.
///
/// # Errors
/// It showed none, or one of another swarm.
pub fn other_side(own: &Member, shown: Option<&[CertificateDer<'_>]>) -> Result<Member, TlsError> {
    let certificate = shown.and_then(<[_]>::first);
    let certificate = certificate.ok_or_else(|| TlsError::Stranger("it showed no certificate".into()))?;
    let other = member(certificate).map_err(TlsError::Stranger)?;
    if other.cluster != own.cluster {
        return Err(TlsError::Stranger(format!(
            "node {} is of swarm {}, this one of {}",
            other.node, other.cluster, own.cluster
        )));
    }
    if other.role != MANAGER && other.role != WORKER {
        return Err(TlsError::Stranger(format!("node {} has the role {:?}", other.node, other.role)));
    }
    Ok(other)
}

fn member(certificate: &CertificateDer<'_>) -> Result<Member, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
    let subject = parsed.subject();
    let one = |what: &str, value: Option<&AttributeTypeAndValue<'_>>| {
        let text = value.and_then(|value| value.as_str().ok()).map(str::to_owned);
        text.ok_or_else(|| format!("its certificate names no {what}"))
    };
    Ok(Member {
        cluster: one("cluster", subject.iter_organization().next())?,
        role: one("role", subject.iter_organizational_unit().next())?,
        node: one("node", subject.iter_common_name().next())?,
        until: until(parsed.validity().not_after.timestamp()),
    })
}

/// A point of time as certificates have it.
fn until(timestamp: i64) -> SystemTime {
    // Far away is for ever.
    let seconds = u64::try_from(timestamp).unwrap_or_default().min(u32::MAX.into());
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}
