//! Pins: one directory for each network namespace and interface, so that several agents on one machine, with
//! interfaces of the same name, do not get into each other's way.
//!
//! ```text
//! /sys/fs/bpf/lb/<cookie of the network namespace>/<interface>/table-CONNECTIONS4 … program-uplink_xdp … link-xdp …
//! ```
//!
//! The cookie is never given twice while the machine runs, unlike a namespace's inode.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, ErrorKind},
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{DirBuilderExt as _, MetadataExt as _},
            net::UnixDatagram,
        },
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use super::{DatapathError, is_bpffs, sys};
use crate::plan::Role;

const BPFFS: &str = "/sys/fs/bpf";

/// Pin of the XDP link.
pub(super) const XDP: &str = "xdp";
/// Pin of the uplink's TC link.
pub(super) const UPLINK_TC: &str = "uplink-tc";
/// Pin of the link where the uplink lets frames out.
pub(super) const UPLINK_EGRESS: &str = "uplink-egress";
/// What the pin of the link where frames leave to other nodes begins with; the interface's index follows.
pub(super) const PEER_EGRESS: &str = "peer-egress-";
/// What the names of links' pins begin with.
const LINK: &str = "link-";

impl Role {
    /// What the pin of the link where frames come in begins with; the interface's index follows.
    const fn prefix(self) -> &'static str {
        match self {
            Self::Tasks => "task-",
            Self::Peers => "peer-",
            Self::Translated => "task-egress-",
        }
    }

    /// Pin of the link where frames come in by an interface.
    pub(super) fn link(self, ifindex: u32) -> String {
        format!("{}{ifindex}", self.prefix())
    }
}

/// The pins of one interface.
#[derive(Clone, Debug)]
pub struct PinDir {
    path: PathBuf,
    interface: String,
}

/// Keeps other controllers out; a crash releases it.
#[derive(Debug)]
pub struct Lock {
    directory: Flock<fs::File>,
}

impl Lock {
    /// Whether the directory that is there now is the one that is locked.
    fn is_of(&self, path: &Path) -> bool {
        let place = |meta: fs::Metadata| (meta.dev(), meta.ino());
        let (locked, there) = (self.directory.metadata().map(place), fs::metadata(path).map(place));
        matches!((locked, there), (Ok(locked), Ok(there)) if locked == there)
    }
}

impl PinDir {
    /// The directory of an interface of the current network namespace, which need not exist yet.
    ///
    /// # Errors
    /// There is no bpffs, or the kernel does not tell the namespace.
    pub fn of(interface: &str) -> Result<Self, DatapathError> {
        let path = namespace()?.join(encode(interface));
        Ok(Self { path, interface: interface.to_owned() })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a datapath is there.
    ///
    /// # Errors
    /// Who asks may not look: whether one is there is then not known.
    pub fn exists(&self) -> Result<bool, DatapathError> {
        let config = self.table(lb_common::abi::table::CONFIG);
        config.try_exists().map_err(|error| DatapathError::pin("look at", config, error))
    }

    /// Makes the directory, if need be, and takes its lock.
    ///
    /// # Errors
    /// Another controller holds it.
    pub(super) fn hold(&self) -> Result<Lock, DatapathError> {
        loop {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&self.path)
                .map_err(|error| DatapathError::pin("create", &self.path, error))?;
            match self.lock() {
                // Whoever removes a datapath removes its directory: a lock of what is no more keeps nobody out.
                Ok(lock) if lock.is_of(&self.path) => return Ok(lock),
                Ok(_) => {}
                Err(DatapathError::Pin { cause, .. }) if cause.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Makes sure that nobody but this user can change what is pinned, or put another directory in the place of one on the way
    /// to it: a file system that all may write to lets anybody make them first.
    ///
    /// # Errors
    /// Somebody can.
    fn is_ours(&self) -> Result<(), DatapathError> {
        let owner = nix::unistd::geteuid().as_raw();
        let ours: Vec<&Path> = self.path.ancestors().take(3).collect();
        for (directory, shared) in
            ours.iter().rev().map(|path| (*path, false)).chain([(Path::new(BPFFS), true)])
        {
            let meta = fs::symlink_metadata(directory)
                .map_err(|error| DatapathError::pin("look at", directory, error))?;
            if let Some(reason) = misuse(&meta, owner, shared) {
                return Err(DatapathError::Unsafe { path: directory.to_owned(), reason });
            }
        }
        Ok(())
    }

    /// Takes the lock of a directory that is there.
    ///
    /// # Errors
    /// Another controller holds it, or others may change it.
    pub fn lock(&self) -> Result<Lock, DatapathError> {
        self.is_ours()?;
        let directory =
            fs::File::open(&self.path).map_err(|error| DatapathError::pin("open", &self.path, error))?;
        let place = directory.metadata().map(|meta| (meta.dev(), meta.ino())).unwrap_or_default();
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(directory) => Ok(Lock { directory }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                Err(DatapathError::Held { interface: self.interface.clone(), pid: holder(place) })
            }
            Err((_, errno)) => Err(DatapathError::pin("lock", &self.path, errno.into())),
        }
    }

    /// The process that controls this datapath, if one does.
    pub fn controller(&self) -> Option<u32> {
        let meta = fs::metadata(&self.path).ok()?;
        holder((meta.dev(), meta.ino()))
    }

    /// Pin of a table.
    pub fn table(&self, name: &str) -> PathBuf {
        self.path.join(format!("table-{name}"))
    }

    /// Pin of a program.
    pub fn program(&self, name: &str) -> PathBuf {
        self.path.join(format!("program-{name}"))
    }

    /// Pin of a program that is to take its place.
    pub(super) fn next_program(&self, name: &str) -> PathBuf {
        self.path.join(format!("next-program-{name}"))
    }

    /// Pin of a link.
    pub fn link(&self, name: &str) -> PathBuf {
        self.path.join(format!("{LINK}{name}"))
    }

    /// Whether the uplink's TC program is attached by a link, not by a filter.
    pub fn has_tc_link(&self) -> bool {
        self.link(UPLINK_TC).exists()
    }

    /// Whether a link is pinned.
    pub(super) fn has_links(&self) -> bool {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().as_encoded_bytes().starts_with(LINK.as_bytes()))
    }

    /// The interfaces that have a pinned link for this role.
    pub(super) fn links_beside(&self, role: Role) -> Vec<u32> {
        let prefix = format!("{LINK}{}", role.prefix());
        let name = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_prefix(&prefix)?.parse().ok();
        fs::read_dir(&self.path).into_iter().flatten().flatten().filter_map(name).collect()
    }

    /// Removes a pin; one that is not there is as good.
    pub(super) fn remove(&self, pin: &Path) {
        if let Err(error) = fs::remove_file(pin)
            && error.kind() != ErrorKind::NotFound
        {
            log::warn!("remove pin {}: {error}", pin.display());
        }
    }

    /// Detaches a pinned link, and removes its pin; one that is not there is as good.
    pub(super) fn remove_link(&self, pin: &Path) {
        if let Err(error) = sys::detach_link(pin)
            && error.kind() != ErrorKind::NotFound
        {
            // It goes with its pin.
            log::debug!("detach the link {}: {error}", pin.display());
        }
        self.remove(pin);
    }

    /// Replaces a pin.
    pub(super) fn replace(
        &self,
        path: &Path,
        pin: impl FnOnce(&Path) -> Result<(), aya::pin::PinError>,
    ) -> Result<(), DatapathError> {
        self.remove(path);
        pin(path)
            .map_err(|error| DatapathError::pin("pin", path, io::Error::other(super::error::chain(&error))))
    }

    /// Gives a pin another name; what has that goes.
    pub(super) fn rename(&self, from: &Path, to: &Path) -> Result<(), DatapathError> {
        fs::rename(from, to).map_err(|error| DatapathError::pin("rename", from, error))
    }

    /// Removes every pin and the directory, links first.
    pub(super) fn remove_all(&self) {
        let mut pins: Vec<PathBuf> =
            fs::read_dir(&self.path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        // "link-…" sorts before "next-program-…", "program-…" and "table-…".
        pins.sort();
        for pin in pins {
            let name = pin.file_name().map(|name| name.to_string_lossy());
            if name.is_some_and(|name| name.starts_with(LINK)) {
                self.remove_link(&pin)
            } else {
                self.remove(&pin)
            }
        }
        for directory in self.path.ancestors().take(3) {
            // Another interface, namespace or agent may still need the upper ones.
            if fs::remove_dir(directory).is_err() {
                break;
            }
        }
    }
}

/// Why a directory is not safe from users other than its owner; `shared` is one in which all may make their own, but touch
/// nobody else's.
fn misuse(meta: &fs::Metadata, owner: u32, shared: bool) -> Option<String> {
    const OTHERS_WRITE: u32 = 0o022;
    const STICKY: u32 = 0o1000;
    if !meta.is_dir() {
        return Some("is no directory".into());
    }
    // Root may do everything in any case.
    if meta.uid() != owner && !(shared && meta.uid() == 0) {
        return Some(format!("belongs to user {}, not to {owner}", meta.uid()));
    }
    let open = meta.mode() & OTHERS_WRITE != 0 && !(shared && meta.mode() & STICKY != 0);
    open.then(|| format!("may be written to by others (mode {:04o})", meta.mode() & 0o7777))
}

/// The interfaces of the current network namespace that have a datapath.
///
/// # Errors
/// There is no bpffs, or who asks may not look.
pub fn attached_interfaces() -> Result<Vec<String>, DatapathError> {
    let folder = namespace()?;
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| DatapathError::pin("look at", folder, error))?,
    };
    let mut names = Vec::new();
    for name in entries.flatten().filter_map(|entry| entry.file_name().to_str().map(decode)) {
        let pins = PinDir::of(&name)?;
        // One that is held has a datapath, or will have one in a moment.
        if pins.exists()? || pins.controller().is_some() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// The directories of all network namespaces that have pins, by cookie.
///
/// # Errors
/// There is no bpffs, or who asks may not look.
pub fn pinned_namespaces() -> Result<BTreeMap<u64, PathBuf>, DatapathError> {
    let own = namespace()?;
    let Some(root) = own.parent() else { return Ok(BTreeMap::new()) };
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        entries => entries.map_err(|error| DatapathError::pin("look at", root, error))?,
    };
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths.filter_map(|path| Some((path.file_name()?.to_str()?.parse().ok()?, path))).collect())
}

/// Removes the pins of a network namespace that is gone.
pub fn remove_abandoned(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let interface = entry.file_name().to_str().map(decode).unwrap_or_default();
        PinDir { path: entry.path(), interface }.remove_all();
    }
    // The last one has removed it, unless it was empty.
    let _ = fs::remove_dir(folder);
}

/// The directory of the current network namespace.
fn namespace() -> Result<PathBuf, DatapathError> {
    let bpffs = Path::new(BPFFS);
    if !is_bpffs(bpffs) {
        return Err(DatapathError::NoBpffs { path: bpffs.to_owned() });
    }
    let cookie = netns_cookie()
        .map_err(|error| DatapathError::pin("ask for the network namespace of", bpffs, error))?;
    Ok(bpffs.join("lb").join(cookie.to_string()))
}

/// The network namespace's cookie (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn netns_cookie() -> io::Result<u64> {
    let socket = UnixDatagram::unbound()?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// bpffs keeps dots in names for itself.
fn encode(interface: &str) -> String {
    interface.replace('%', "%25").replace('.', "%2E")
}

fn decode(name: &str) -> String {
    name.replace("%2E", ".").replace("%25", "%")
}

/// The process that holds a lock on this device and inode, by `/proc/locks`.
fn holder((device, inode): (u64, u64)) -> Option<u32> {
    let wanted = format!("{:02x}:{:02x}:{inode}", libc::major(device), libc::minor(device));
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // 1: FLOCK ADVISORY WRITE 1234 00:1b:56 0 EOF
        let [_, "FLOCK", _, _, pid, place, ..] = fields.as_slice() else {
            return None;
        };
        (*place == wanted).then(|| pid.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_others_can_change_is_not_used() {
        use std::os::unix::fs::{PermissionsExt as _, symlink};
        let folder = tempfile::tempdir().unwrap();
        let own = nix::unistd::geteuid().as_raw();
        let says = |path: &Path, owner: u32, mode: u32, shared: bool| {
            if path.is_dir() && !path.is_symlink() {
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            }
            misuse(&fs::symlink_metadata(path).unwrap(), owner, shared).unwrap_or_default()
        };
        let directory = folder.path().join("lb");
        fs::create_dir(&directory).unwrap();
        assert_eq!(says(&directory, own, 0o700, false), "");
        assert_eq!(says(&directory, own, 0o755, false), "");
        assert_eq!(says(&directory, own, 0o770, false), "may be written to by others (mode 0770)");
        assert_eq!(says(&directory, own, 0o1777, false), "may be written to by others (mode 1777)");
        assert_eq!(says(&directory, own, 0o1777, true), "");
        assert_eq!(says(&directory, own, 0o777, true), "may be written to by others (mode 0777)");
        assert_eq!(
            says(&directory, own + 1, 0o700, false),
            format!("belongs to user {own}, not to {}", own + 1)
        );
        // A link leads where its owner wants.
        let link = folder.path().join("link");
        symlink(&directory, &link).unwrap();
        assert_eq!(says(&link, own, 0o700, false), "is no directory");
    }

    #[test]
    fn names_with_dots_come_back() {
        for name in ["eth1", "eth1.100", "a%2Eb", "x%", "."] {
            assert_eq!(decode(&encode(name)), name);
            assert!(!encode(name).contains('.'));
        }
    }
}
