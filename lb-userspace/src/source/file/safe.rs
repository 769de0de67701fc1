//! Reads a file that others may have put there: in bounded time and memory, and none that they could not have read.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// The largest file, in bytes: some hundred thousand tasks.
const LARGEST: u64 = 32 << 20;
/// Links from one to the next that are followed, as the kernel has it.
const LINKS: usize = 40;

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The kernel says so.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("it is {0}, not a file; name a file")]
    Kind(&'static str),
    /// It is too large.
    #[error("it has {0} bytes, more than the {LARGEST} that a cluster file may have")]
    Large(u64),
    /// It is no text.
    #[error("it is not UTF-8 text")]
    Text,
    /// It holds a secret that others may read.
    #[error("others than its owner may read or write it; chmod 600 {}", .0.display())]
    Open(PathBuf),
    /// Somebody else knows the secret.
    #[error("it belongs to user {owner}; chown root {}", .path.display())]
    Owner {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Somebody points at what is not his.
    #[error(
        "the link {} of user {owner} leads to a file of user {of}, whom it does not belong to; put the file itself there, or \
         have the link made by root", .link.display()
    )]
    Link {
        /// The link.
        link: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Whose the file is.
        of: u32,
    },
}

/// The text of a file.
pub(super) fn read(path: &Path) -> Result<String, ReadError> {
    let (file, meta) = open(path)?;
    take(&file, meta.len())
}

/// The text of a file that is nobody else's business.
pub(super) fn read_secret(path: &Path) -> Result<String, ReadError> {
    let (file, meta) = open(path)?;
    if meta.mode() & 0o077 != 0 {
        return Err(ReadError::Open(path.to_owned()));
    }
    if meta.uid() != 0 && meta.uid() != nix::unistd::geteuid().as_raw() {
        return Err(ReadError::Owner { path: path.to_owned(), owner: meta.uid() });
    }
    take(&file, meta.len())
}

fn open(path: &Path) -> Result<(File, fs::Metadata), ReadError> {
    let (place, links) = resolve(path)?;
    // What takes the place of the file meanwhile: a link is not followed, and nothing is waited for.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(&place)?;
    let meta = file.metadata()?;
    if let Some(kind) = kind(&meta) {
        return Err(ReadError::Kind(kind));
    }
    for (link, owner) in links {
        if owner != 0 && owner != meta.uid() {
            return Err(ReadError::Link { link, owner, of: meta.uid() });
        }
    }
    Ok((file, meta))
}

fn take(file: &File, bytes: u64) -> Result<String, ReadError> {
    if bytes > LARGEST {
        return Err(ReadError::Large(bytes));
    }
    let mut text = Vec::with_capacity(bytes as usize);
    // It may grow meanwhile, or be one whose size the kernel does not say.
    file.take(LARGEST + 1).read_to_end(&mut text)?;
    if text.len() as u64 > LARGEST {
        return Err(ReadError::Large(text.len() as u64));
    }
    String::from_utf8(text).map_err(|_| ReadError::Text)
}

/// Where the links that a path ends in lead, and whose they and those on the way are.
fn resolve(path: &Path) -> Result<(PathBuf, Vec<(PathBuf, u32)>), ReadError> {
    let (mut place, mut links) = (path.to_owned(), Vec::new());
    loop {
        let meta = fs::symlink_metadata(&place)?;
        if !meta.is_symlink() {
            for folder in place.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty()) {
                let meta = fs::symlink_metadata(folder)?;
                if meta.is_symlink() {
                    links.push((folder.to_owned(), meta.uid()));
                }
            }
            return Ok((place, links));
        }
        if links.len() == LINKS {
            return Err(io::Error::from_raw_os_error(libc::ELOOP).into());
        }
        links.push((place.clone(), meta.uid()));
        let target = fs::read_link(&place)?;
        place = place.parent().unwrap_or(Path::new("/")).join(target);
    }
}

/// What it is, if it is no file.
fn kind(meta: &fs::Metadata) -> Option<&'static str> {
    use std::os::unix::fs::FileTypeExt as _;
    let kind = meta.file_type();
    match kind {
        _ if kind.is_file() => None,
        _ if kind.is_dir() => Some("a directory"),
        _ if kind.is_fifo() => Some("a FIFO"),
        _ if kind.is_socket() => Some("a socket"),
        _ if kind.is_char_device() || kind.is_block_device() => Some("a device"),
        _ => Some("something else"),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::{fs::symlink, net::UnixListener},
        time::{Duration, Instant},
    };

    use super::*;

    fn says(path: &Path) -> String {
        let start = Instant::now();
        let said = read(path).map_or_else(|error| error.to_string(), |text| format!("{} bytes", text.len()));
        assert!(start.elapsed() < Duration::from_secs(5), "{path:?} took {:?}", start.elapsed());
        said
    }

    #[test]
    fn what_is_no_file_is_an_error_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(says(&at("fifo")), "it is a FIFO, not a file; name a file");
        assert_eq!(says(folder.path()), "it is a directory, not a file; name a file");
        let _socket = UnixListener::bind(at("socket")).unwrap();
        assert!(says(&at("socket")).contains("No such device or address"));
        for device in ["/dev/zero", "/dev/tty"] {
            let said = says(Path::new(device));
            assert!(said.contains("a device") || said.contains("os error"), "{said}");
        }
        symlink(at("loop"), at("loop")).unwrap();
        assert!(says(&at("loop")).contains("symbolic links"), "{}", says(&at("loop")));
        assert!(says(&at("nothing")).contains("No such file"));
    }

    #[test]
    fn a_file_that_is_too_large_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large");
        let file = File::create(&path).unwrap();
        file.set_len(200 << 20).unwrap();
        assert!(says(&path).starts_with("it has 209715200 bytes, more than the "), "{}", says(&path));
        file.set_len(LARGEST).unwrap();
        assert_eq!(says(&path), format!("{LARGEST} bytes"));
        fs::write(&path, [0xff]).unwrap();
        assert_eq!(says(&path), "it is not UTF-8 text");
        // One that does not say how long it is.
        assert!(says(Path::new("/proc/self/status")).ends_with(" bytes"));
    }

    #[test]
    fn nobody_has_a_file_read_that_is_not_his() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("secret"), "password").unwrap();
        symlink("secret", at("own")).unwrap();
        symlink(at("own"), at("twice")).unwrap();
        assert_eq!((says(&at("own")).as_str(), says(&at("twice")).as_str()), ("8 bytes", "8 bytes"));
        // Only root can make links of others.
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let lchown = |name: &str, user: u32| std::os::unix::fs::lchown(at(name), Some(user), None).unwrap();
        lchown("own", 65534);
        for link in ["own", "twice"] {
            let said = says(&at(link));
            assert!(said.contains("of user 65534 leads to a file of user 0"), "{said}");
        }
        lchown("secret", 65534);
        assert_eq!(says(&at("twice")), "8 bytes");
        // A folder of another's on the way.
        symlink(folder.path(), at("folder")).unwrap();
        lchown("folder", 1);
        let said = says(&at("folder").join("secret"));
        assert!(said.contains("of user 1 leads to a file of user 65534"), "{said}");
        lchown("twice", 1);
        assert!(says(&at("twice")).contains("of user 1 leads to a file of user 65534"));
    }
}
