//! The keys by which nodes know each other's packets in the tunnel.
//!
//! ```text
//! own secret ─► public key ─► agents, managers ─► all nodes                                (a swarm)
//! own secret × other's public key ─► what only these two know × both names ─► a cookie for either direction
//! key file × both names ──────────────────────────────────────────────────────► the same      (a cluster file)
//! ```
//!
//! A cookie is eight bytes that all packets of one node to another carry. Who can read what nodes send to each other can read it:
//! it keeps out those who can only send.

use std::{
    collections::HashMap,
    fmt, fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    str::FromStr,
};

use ring::{
    hmac,
    rand::{SecureRandom as _, SystemRandom},
};
use serde::{Deserialize, Serialize, de::Error as _};

/// The name of the file in which a node's secret is stored.
const FILE: &str = "tunnel.key";
/// Bytes of a key.
const BYTES: usize = 32;

/// Why something is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It is not written as one.
    #[error("it is no key: one is 64 hexadecimal digits, as `lb-userspace keygen` writes them")]
    Digits,
    /// It is all zeroes.
    #[error("it is no key: all of it is zero; `lb-userspace keygen` makes one")]
    Zero,
    /// The kernel gives no random numbers.
    #[error("the kernel gives no random numbers")]
    Random,
}

fn random() -> Result<[u8; BYTES], KeyError> {
    let mut bytes = [0; BYTES];
    SystemRandom::new().fill(&mut bytes).map_err(|_| KeyError::Random)?;
    Ok(bytes)
}

fn digits(bytes: &[u8; BYTES]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(digits: &str) -> Result<[u8; BYTES], KeyError> {
    let mut bytes = [0; BYTES];
    if digits.len() != 2 * BYTES || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(KeyError::Digits);
    }
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| KeyError::Digits)?;
    }
    if bytes == [0; BYTES] { Err(KeyError::Zero) } else { Ok(bytes) }
}

/// Keys are written as hexadecimal digits wherever they are written.
macro_rules! key {
    ($($(#[doc = $doc:literal])+ $name:ident;)+) => {$(
        $(#[doc = $doc])+
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name([u8; BYTES]);

        impl FromStr for $name {
            type Err = KeyError;

            fn from_str(text: &str) -> Result<Self, KeyError> {
                bytes(text.trim()).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(&digits(&self.0))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(D::Error::custom)
            }
        }
    )+};
}

key! {
    /// What only a node itself knows: its part of what it shares with each of the others.
    Secret;
    /// What others are told of a node's [`Secret`] (X25519, RFC 7748).
    PublicKey;
    /// What all nodes of a cluster file know, and nobody else.
    SharedKey;
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl fmt::Debug for SharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedKey(…)")
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", digits(&self.0))
    }
}

/// What is known of a node's key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKey {
    /// Nothing: what was known before stands.
    #[default]
    Unknown,
    /// It has none: its agent is older than keys, or none is asked for.
    None,
    /// It has this one.
    Public(PublicKey),
}

impl NodeKey {
    /// Whether nothing is known.
    pub const fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown)
    }
}

/// The cookies of packets between this node and another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cookies {
    /// Of packets to it.
    pub outgoing: u64,
    /// Of packets from it.
    pub incoming: u64,
}

impl fmt::Debug for Cookies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cookies(…)")
    }
}

impl Secret {
    /// A new one.
    ///
    /// # Errors
    /// The kernel gives no random numbers.
    pub fn generate() -> Result<Self, KeyError> {
        random().map(Self)
    }

    /// The one that was stored in this folder, if it was.
    pub fn load(folder: &Path) -> Option<Self> {
        fs::read_to_string(folder.join(FILE)).ok()?.parse().ok()
    }

    /// Stores it in this folder, for the owner alone to read.
    ///
    /// # Errors
    /// The kernel refuses the write; what was there stays.
    pub fn store(&self, folder: &Path) -> io::Result<()> {
        let (file, new) = (folder.join(FILE), folder.join(format!("{FILE}.new")));
        if Self::load(folder) == Some(*self) {
            return Ok(());
        }
        let mut options = fs::OpenOptions::new();
        let opened = options.write(true).create(true).truncate(true).mode(0o600).open(&new);
        opened.and_then(|mut opened| writeln!(opened, "{}", digits(&self.0)))?;
        // Whole, or not at all.
        fs::rename(new, file)
    }

    /// What others are told of it.
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519_dalek::x25519(self.0, x25519_dalek::X25519_BASEPOINT_BYTES))
    }

    /// The cookies between this node and the one of that name and key. `None` if that key is no key: one that has every two nodes
    /// share the same (RFC 7748, 6.1). Names are in it because keys alone prove nothing: who told another's key for its own would be
    /// sent the other's cookies.
    fn agree(&self, own: &str, other: &str, key: &PublicKey) -> Option<Cookies> {
        let shared = x25519_dalek::x25519(self.0, key.0);
        (shared != [0; BYTES]).then(|| SharedKey(shared).cookies(own, other))
    }
}

impl SharedKey {
    /// A new one, as it is written into a file.
    ///
    /// # Errors
    /// The kernel gives no random numbers.
    pub fn generate() -> Result<String, KeyError> {
        Ok(digits(&random()?))
    }

    /// The cookies between two nodes by their names.
    pub fn cookies(&self, own: &str, other: &str) -> Cookies {
        let (own, other) = (own.as_bytes(), other.as_bytes());
        Cookies { outgoing: cookie(&self.0, own, other), incoming: cookie(&self.0, other, own) }
    }
}

/// The cookie of packets from one node to another, of what both know. Never zero, which stands for none.
fn cookie(shared: &[u8; BYTES], from: &[u8], to: &[u8]) -> u64 {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, shared));
    context.update(b"lb-userspace tunnel cookie");
    // Lengths first, so that no two pairs of names read the same.
    for name in [from, to] {
        context.update(&(name.len() as u64).to_le_bytes());
        context.update(name);
    }
    let tag = context.sign();
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&tag.as_ref()[..8]);
    u64::from_le_bytes(bytes).max(1)
}

/// This node's secret, and what was made of it.
#[derive(Debug)]
pub struct Keyring {
    secret: Secret,
    /// This node's name, by which they were made.
    own: String,
    /// By the other's name: its key and the cookies, if it is one. Each takes some ten thousandths of a second.
    agreed: HashMap<String, (PublicKey, Option<Cookies>)>,
}

impl Keyring {
    /// A ring with nothing but the secret.
    pub fn new(secret: Secret) -> Self {
        Self { secret, own: String::new(), agreed: HashMap::new() }
    }

    /// The cookies between this node and the one of that name and key, if that is one.
    pub fn cookies(&mut self, own: &str, other: &str, key: &PublicKey) -> Option<Cookies> {
        if self.own != own {
            (self.own, self.agreed) = (own.to_owned(), HashMap::new());
        }
        match self.agreed.get(other) {
            Some((known, cookies)) if known == key => *cookies,
            _ => {
                let cookies = self.secret.agree(own, other, key);
                self.agreed.insert(other.to_owned(), (*key, cookies));
                cookies
            }
        }
    }

    /// Forgets nodes that are gone.
    pub fn retain(&mut self, there: impl Fn(&str) -> bool) {
        self.agreed.retain(|name, _| there(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of them has Bob's key of RFC 7748, 6.1.
    #[test]
    fn two_nodes_find_the_same_cookies_and_a_third_finds_others() {
        let alice = Secret::generate().unwrap();
        let bob: Secret = "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb".parse().unwrap();
        assert_eq!(
            digits(&bob.public().0),
            "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
        );
        let of_alice = alice.agree("alice", "bob", &bob.public()).unwrap();
        let of_bob = bob.agree("bob", "alice", &alice.public()).unwrap();
        assert_eq!(
            (of_alice.outgoing, of_alice.incoming),
            (of_bob.incoming, of_bob.outgoing),
            "what goes out here comes in there"
        );
        assert_ne!(of_alice.outgoing, of_alice.incoming);
        let eve = Secret::generate().unwrap();
        let of_eve = eve.agree("alice", "bob", &bob.public()).unwrap();
        assert!(![of_alice.outgoing, of_alice.incoming].contains(&of_eve.outgoing));
        // Told as Eve's own, Bob's key has Alice send her nothing that Bob would take.
        let to_eve = alice.agree("alice", "eve", &bob.public()).unwrap();
        assert!(![of_alice.outgoing, of_alice.incoming].contains(&to_eve.outgoing));
        let mut ring = Keyring::new(alice);
        for _ in 0..2 {
            assert_eq!(ring.cookies("alice", "bob", &bob.public()), Some(of_alice));
        }
        assert_ne!(ring.cookies("alice", "bob", &eve.public()), Some(of_alice), "another key");
        assert_ne!(ring.cookies("alba", "bob", &bob.public()), Some(of_alice), "another name");
        ring.retain(|name| name != "bob");
        assert_eq!(ring.cookies("alice", "bob", &bob.public()), Some(of_alice));
    }

    #[test]
    fn a_key_that_makes_all_secrets_the_same_is_none() {
        let own = Secret::generate().unwrap();
        // Points of small order: 1, and the two of order eight.
        for point in [
            "0100000000000000000000000000000000000000000000000000000000000000",
            "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
            "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        ] {
            assert_eq!(own.agree("a", "b", &point.parse().unwrap()), None, "{point}");
        }
    }

    #[test]
    fn names_of_a_shared_key_are_told_apart() {
        let key: SharedKey = SharedKey::generate().unwrap().parse().unwrap();
        let cookies = key.cookies("node1", "node2");
        let other = key.cookies("node2", "node1");
        assert_eq!((cookies.outgoing, cookies.incoming), (other.incoming, other.outgoing));
        assert_ne!(key.cookies("node1", "2"), key.cookies("node", "12"));
        let another: SharedKey = SharedKey::generate().unwrap().parse().unwrap();
        assert_ne!(another.cookies("node1", "node2"), cookies);
    }

    #[test]
    fn a_secret_is_stored_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Secret::load(folder.path()), None);
        for secret in [(); 2].map(|()| Secret::generate().unwrap()) {
            secret.store(folder.path()).unwrap();
            secret.store(folder.path()).unwrap();
            assert_eq!(Secret::load(folder.path()), Some(secret));
        }
        let mode = fs::metadata(folder.path().join(FILE)).unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::mode(&mode) & 0o777, 0o600);
        fs::write(folder.path().join(FILE), "cut short").unwrap();
        assert_eq!(Secret::load(folder.path()), None);
        let error = Secret::generate().unwrap().store(&folder.path().join("not there")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn keys_are_read_as_they_are_written_and_secrets_are_not_shown() {
        let text = SharedKey::generate().unwrap();
        let key: SharedKey = format!("{text}\n").parse().unwrap();
        assert_eq!(serde_json::to_string(&key).unwrap(), format!("{text:?}"));
        assert_eq!(serde_json::from_str::<SharedKey>(&format!("{text:?}")).unwrap(), key);
        for text in ["", "00", &"g".repeat(64), &"é".repeat(32)] {
            assert_eq!(text.parse::<SharedKey>(), Err(KeyError::Digits), "{text}");
        }
        assert_eq!("0".repeat(64).parse::<SharedKey>(), Err(KeyError::Zero));
        let secret = Secret::generate().unwrap();
        for shown in [format!("{key:?}"), format!("{secret:?}"), format!("{:?}", Keyring::new(secret))] {
            assert!(!shown.contains(&text[..8]) && !shown.contains(&digits(&secret.0)[..8]), "{shown}");
        }
        let of = |key| serde_json::to_string(&key).unwrap();
        assert_eq!((of(NodeKey::Unknown), of(NodeKey::None)), (r#""unknown""#.into(), r#""none""#.into()));
        let public = secret.public();
        assert_eq!(of(NodeKey::Public(public)), format!(r#"{{"public":"{}"}}"#, digits(&public.0)));
    }
}
