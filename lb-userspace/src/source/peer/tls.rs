//! Who may talk to whom: the certificates that Swarm gives every node, and keeps fresh.
//!
//! Organisation is the cluster, organisational unit the role, common name the node; the role stands among the names
//! too. They rotate while Swarm runs, so that they are read anew for every connection.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    server::WebPkiClientVerifier,
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
}

/// What this node proves itself with.
pub struct Identity {
    /// This node.
    pub own: Member,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl Identity {
    /// Reads the files as they are now, from Docker's root directory.
    ///
    /// # Errors
    /// One is missing, is no certificate or key, or is locked.
    pub fn load(root: &Path) -> Result<Self, TlsError> {
        let folder = root.join("swarm/certificates");
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
        let certificate = read("swarm-node.crt")?;
        let chain = certificates(&certificate)?;
        let own = member(&chain[0]).map_err(|reason| invalid(&certificate.0, reason))?;
        let (path, text) = read("swarm-node.key")?;
        if text.contains("ENCRYPTED") {
            return Err(TlsError::Locked(path));
        }
        // Swarm keeps headers of its own in it, as RFC 1421 has them; nobody else reads those.
        let plain: String =
            text.lines().filter(|line| !line.contains(':')).map(|l| format!("{l}\n")).collect();
        let key = PrivateKeyDer::from_pem_slice(plain.as_bytes()).map_err(|error| invalid(&path, error))?;
        let authorities = read("swarm-root-ca.crt")?;
        let mut roots = RootCertStore::empty();
        for authority in certificates(&authorities)? {
            roots.add(authority).map_err(|error| invalid(&authorities.0, error))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        Ok(Self { own, chain, key, roots: Arc::new(roots), provider })
    }

    /// For connecting to a manager.
    ///
    /// # Errors
    /// Key and certificate do not fit.
    pub fn client(self) -> Result<Arc<ClientConfig>, TlsError> {
        let config = ClientConfig::builder_with_provider(self.provider)
            .with_safe_default_protocol_versions()
            .and_then(|builder| {
                builder.with_root_certificates(self.roots).with_client_auth_cert(self.chain, self.key)
            });
        config.map(Arc::new).map_err(|error| TlsError::Stranger(error.to_string()))
    }

    /// For being connected to by nodes of the swarm.
    ///
    /// # Errors
    /// Key and certificate do not fit.
    pub fn server(self) -> Result<Arc<ServerConfig>, TlsError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots, self.provider.clone()).build();
        let verifier = verifier.map_err(|error| TlsError::Stranger(error.to_string()))?;
        let config = ServerConfig::builder_with_provider(self.provider)
            .with_safe_default_protocol_versions()
            .and_then(|builder| {
                builder.with_client_cert_verifier(verifier).with_single_cert(self.chain, self.key)
            });
        config.map(Arc::new).map_err(|error| TlsError::Stranger(error.to_string()))
    }
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
    })
}
