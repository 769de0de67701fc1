//! Trying packages: each is installed into a root of its own, as a machine's first package manager would do it, what it
//! brings is run there, and it is taken away again.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::run::{as_root, capture, find, output};

const CONFIG: &str = "etc/lb-userspace/agent.toml";
/// What every package must bring.
const FILES: [&str; 7] = [
    "usr/sbin/lb-userspace",
    "usr/sbin/lb",
    CONFIG,
    "usr/lib/systemd/system/lb-userspace.service",
    "usr/share/man/man8/lb-userspace-attach.8.gz",
    "usr/share/bash-completion/completions/lb-userspace",
    "usr/share/doc/lb-userspace/README.md",
];

/// A root with a shell and nothing else.
struct Root(PathBuf);

impl Root {
    fn new(folder: &Path, name: &str) -> Result<Self> {
        let root = folder.join(name);
        if root.exists() {
            capture(as_root("rm", "remove an earlier root").arg("-rf").arg(&root), "rm")?;
        }
        for part in ["bin", "tmp", "var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/rpm"] {
            fs::create_dir_all(root.join(part)).with_context(|| format!("make {}", root.display()))?;
        }
        fs::write(root.join("var/lib/dpkg/status"), "").context("make dpkg's status file")?;
        let busybox = find("busybox").context("busybox was not found")?;
        fs::copy(busybox, root.join("bin/busybox")).context("copy busybox")?;
        symlink("busybox", root.join("bin/sh")).context("link the shell")?;
        Ok(Self(root))
    }

    fn dpkg(&self, arguments: &[&str], package: &Path) -> Result<()> {
        let mut command = as_root("dpkg", "install a package into a root of its own");
        // As with every package manager's first package, nothing else is registered there.
        command.arg(format!("--root={}", self.0.display())).args(["--force-depends", "--force-confold"]);
        capture(command.args(arguments).arg(package), "dpkg")
    }

    fn rpm(&self, arguments: &[&str], package: &Path) -> Result<()> {
        let mut command = as_root("rpm", "install a package into a root of its own");
        command.arg("--root").arg(&self.0).arg("--nodeps");
        capture(command.args(arguments).arg(package), "rpm")
    }

    fn has(&self, file: &str) -> bool {
        self.0.join(file).symlink_metadata().is_ok()
    }

    /// What was installed is there and runs.
    fn check(&self, what: &str) -> Result<()> {
        for file in FILES {
            ensure!(self.has(file), "{what} brings no /{file}");
        }
        let link = self.0.join("usr/sbin/lb");
        ensure!(link.is_symlink(), "{what}: /usr/sbin/lb is no link");
        for program in ["/usr/sbin/lb-userspace", "/usr/sbin/lb"] {
            let said = output(as_root("chroot", "run it there").arg(&self.0).args([program, "--version"]))?;
            ensure!(said.starts_with("lb-userspace "), "{what}: {program} says {said}");
        }
        Ok(())
    }

    fn edit(&self) -> Result<()> {
        let mut command = as_root("sed", "edit a file of that root");
        capture(command.args(["-i", "s/^#iface =/iface =/"]).arg(self.0.join(CONFIG)), "sed")
    }

    fn is_edited(&self, name: &str) -> bool {
        let text = fs::read_to_string(self.0.join(name)).unwrap_or_default();
        text.lines().any(|line| line.starts_with("iface ="))
    }
}

/// Tries the packages that lie in a folder.
///
/// # Errors
/// One does not do what it should.
pub fn run(folder: &Path) -> Result<()> {
    deb(folder)?;
    rpm(folder)?;
    tar(folder)
}

fn deb(folder: &Path) -> Result<()> {
    let package = folder.join("lb-userspace_amd64.deb");
    let root = Root::new(folder, "deb-root")?;
    let name = Path::new("lb-userspace");
    root.dpkg(&["--install"], &package)?;
    root.check(".deb")?;
    root.edit()?;
    root.dpkg(&["--install"], &package)?;
    ensure!(root.is_edited(CONFIG), ".deb: an upgrade has put back the configuration");
    root.dpkg(&["--remove"], name)?;
    ensure!(!root.has("usr/sbin/lb-userspace") && root.has(CONFIG), ".deb: removed is not as it should be");
    root.dpkg(&["--purge"], name)?;
    ensure!(!root.has("etc/lb-userspace"), ".deb: purged, and the configuration is there");
    println!(".deb: installed, upgraded with an edited configuration, removed, purged");
    Ok(())
}

fn rpm(folder: &Path) -> Result<()> {
    let package = folder.join("lb-userspace_amd64.rpm");
    let root = Root::new(folder, "rpm-root")?;
    let name = Path::new("lb-userspace");
    root.rpm(&["--install", "--ignorearch"], &package)?;
    root.check(".rpm")?;
    root.edit()?;
    root.rpm(&["--upgrade", "--ignorearch", "--force"], &package)?;
    ensure!(root.is_edited(CONFIG), ".rpm: an upgrade has put back the configuration");
    root.rpm(&["--erase"], name)?;
    ensure!(!root.has("usr/sbin/lb-userspace"), ".rpm: erased, and the program is there");
    let kept = root.is_edited(&format!("{CONFIG}.rpmsave"));
    ensure!(kept, ".rpm: erased, and the edited configuration is lost");
    println!(".rpm: installed, upgraded with an edited configuration, erased");
    Ok(())
}

fn tar(folder: &Path) -> Result<()> {
    let root = Root::new(folder, "tar-root")?;
    let mut command = Command::new("tar");
    command.arg("-C").arg(&root.0).arg("-xzf").arg(folder.join("lb-userspace_amd64.tar.gz"));
    capture(&mut command, "tar")?;
    root.check(".tar.gz")?;
    println!(".tar.gz: unpacked, runs");
    Ok(())
}
