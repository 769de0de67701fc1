//! The guest's initial file system: a busybox, the programs that the tests call with the libraries they need, the
//! tests themselves, and the kernel's modules.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, BufWriter, Write},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{Tests, archive::Kernel};
use crate::{
    run::{exec, find},
    toolchain,
};

/// What the guest does when it has booted.
const INIT: &str = include_str!("init.sh");
/// What the tests and the agent need of the kernel, where it is not built in.
const MODULES: [&str; 6] = ["veth", "bridge", "8021q", "sch_ingress", "cls_bpf", "nf_conntrack"];
/// Programs of the agent's tests beyond those that setup knows.
const PROGRAMS: [&str; 4] = ["tc", "unshare", "setpriv", "mount"];

/// Packs the file system; where it is.
///
/// # Errors
/// A program or module is missing, or the file cannot be written.
pub fn build(kernel: &Kernel, tests: &Tests<'_>, place: &Path) -> Result<PathBuf> {
    let mut tree = Tree::default();
    tree.text("init", INIT, 0o755);
    let busybox = find("busybox").context("busybox was not found")?;
    tree.file("bin/busybox", &busybox)?;
    let mut linked = BTreeSet::new();
    for name in toolchain::network_programs().chain(PROGRAMS).filter(|name| *name != "busybox") {
        let program = find(name).with_context(|| format!("{name} was not found"))?;
        tree.file(&format!("usr/bin/{name}"), &program)?;
        linked.insert(program);
    }
    tree.file("lb/agent", tests.agent)?;
    tree.file("lb/object", tests.object)?;
    linked.insert(tests.agent.to_owned());
    let runs = tests.on(kernel)?;
    for program in tests.programs {
        let name = test_name(program)?;
        if runs.iter().any(|(run, _)| *run == name) {
            tree.file(&format!("lb/tests/{name}"), program)?;
            linked.insert(program.clone());
        }
    }
    let lines = runs.iter().map(|(program, filter)| format!("{program} {filter}\n"));
    tree.text("lb/list", &lines.collect::<String>(), 0o644);
    for library in linked.iter().map(|program| libraries(program)).collect::<Result<Vec<_>>>()?.concat() {
        tree.file(library.to_string_lossy().trim_start_matches('/'), &library)?;
    }
    tree.text("etc/passwd", "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n", 0o644);
    tree.text("etc/group", "root:x:0:\nnogroup:x:65534:\n", 0o644);
    let mut order = String::new();
    for module in modules(kernel)? {
        let name = module_name(&module);
        tree.bytes(&format!("lb/modules/{name}.ko"), uncompressed(&module)?, 0o644);
        order += &format!("{name}\n");
    }
    tree.text("lb/modules/order", &order, 0o644);
    let image = place.join("initramfs.cpio");
    let file = fs::File::create(&image).with_context(|| format!("create {}", image.display()))?;
    tree.write(BufWriter::new(file)).with_context(|| format!("write {}", image.display()))?;
    Ok(image)
}

/// The name of a test program without the hash that cargo adds.
pub fn test_name(program: &Path) -> Result<String> {
    let name = program.file_name().and_then(|name| name.to_str()).context("a test program without a name")?;
    Ok(name.rsplit_once('-').map_or(name, |(name, _)| name).to_owned())
}

/// The shared libraries of a program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let said = Command::new("ldd").arg(program).output().context("run ldd")?;
    // A static program has none, which ldd takes for a failure.
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        bail!("{}: {}", program.display(), line.trim());
    }
    //  libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…), or /lib64/ld-linux-x86-64.so.2 (0x…)
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

/// The modules' files, each after those it needs. What is built into the kernel has none.
fn modules(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let folder = kernel.modules();
    if !folder.join("modules.dep").exists() {
        let depmod = find("depmod").context("depmod was not found")?;
        exec(Command::new(depmod).args(["--basedir"]).arg(base(&folder)).arg(&kernel.release))?;
    }
    let text = fs::read_to_string(folder.join("modules.dep")).context("read modules.dep")?;
    let built_in = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
    let needs: BTreeMap<String, (PathBuf, Vec<String>)> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| {
            let needs = needs.split_whitespace().map(|need| module_name(Path::new(need))).collect();
            (module_name(Path::new(file)), (folder.join(file), needs))
        })
        .collect();
    let mut order = Vec::new();
    for module in MODULES {
        if built_in.lines().any(|line| module_name(Path::new(line)) == module) {
            continue;
        }
        if !needs.contains_key(module) {
            bail!("kernel {} has no module {module}", kernel.release);
        }
        add(module, &needs, &mut order);
    }
    Ok(order)
}

fn add(module: &str, needs: &BTreeMap<String, (PathBuf, Vec<String>)>, order: &mut Vec<PathBuf>) {
    if let Some((file, first)) = needs.get(module)
        && !order.contains(file)
    {
        first.iter().for_each(|need| add(need, needs, order));
        order.push(file.clone());
    }
}

/// The folder that holds `lib/modules`, as depmod wants it named.
fn base(modules: &Path) -> &Path {
    modules.ancestors().nth(3).unwrap_or(modules)
}

/// `veth` of `kernel/drivers/net/veth.ko.xz`.
fn module_name(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').next().unwrap_or_default().replace('-', "_")
}

fn uncompressed(module: &Path) -> Result<Vec<u8>> {
    let unpacker = match module.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(module).with_context(|| format!("read {}", module.display())),
    };
    let unpacked = Command::new(unpacker).arg("-dc").arg(module).output();
    let unpacked = unpacked.with_context(|| format!("run {unpacker}"))?;
    if !unpacked.status.success() {
        bail!("{unpacker} -dc {}: {}", module.display(), unpacked.status);
    }
    Ok(unpacked.stdout)
}

/// A tree of files, to be written as the archive that the kernel unpacks (cpio, "newc").
#[derive(Default)]
struct Tree {
    files: BTreeMap<String, (u32, Vec<u8>)>,
}

impl Tree {
    fn text(&mut self, path: &str, text: &str, mode: u32) {
        self.bytes(path, text.into(), mode);
    }

    fn file(&mut self, path: &str, from: &Path) -> Result<()> {
        if !self.files.contains_key(path) {
            let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
            let mode = fs::metadata(from)?.permissions().mode() & 0o777;
            self.bytes(path, bytes, mode);
        }
        Ok(())
    }

    fn bytes(&mut self, path: &str, bytes: Vec<u8>, mode: u32) {
        self.files.insert(path.to_owned(), (libc_mode::FILE | mode, bytes));
    }

    fn write(&self, mut to: impl Write) -> io::Result<()> {
        let mut folders = BTreeSet::new();
        for path in self.files.keys() {
            let parents = Path::new(path).ancestors().skip(1).filter(|parent| *parent != Path::new(""));
            folders.extend(parents.map(|parent| parent.to_string_lossy().into_owned()));
        }
        let mut inode = 0;
        // A folder sorts before what it holds.
        for folder in &folders {
            inode += 1;
            entry(&mut to, inode, folder, libc_mode::FOLDER | 0o755, &[])?;
        }
        for (path, (mode, bytes)) in &self.files {
            inode += 1;
            entry(&mut to, inode, path, *mode, bytes)?;
        }
        entry(&mut to, 0, "TRAILER!!!", 0, &[])?;
        to.flush()
    }
}

/// The kinds of files, as `stat` has them.
mod libc_mode {
    pub const FILE: u32 = 0o100_000;
    pub const FOLDER: u32 = 0o040_000;
}

/// One file: thirteen numbers of eight hexadecimal digits, its name, its bytes, each padded to four.
fn entry(to: &mut impl Write, inode: u32, path: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let name = path.len() as u32 + 1;
    let numbers = [inode, mode, 0, 0, 1, 0, bytes.len() as u32, 0, 0, 0, 0, name, 0];
    write!(to, "070701")?;
    numbers.iter().try_for_each(|number| write!(to, "{number:08x}"))?;
    write!(to, "{path}\0")?;
    to.write_all(&[0; 3][..padding(110 + name as usize)])?;
    to.write_all(bytes)?;
    to.write_all(&[0; 3][..padding(bytes.len())])
}

fn padding(length: usize) -> usize {
    length.next_multiple_of(4) - length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_to_four() {
        let mut bytes = Vec::new();
        entry(&mut bytes, 1, "a", libc_mode::FILE | 0o644, b"hello").expect("a vector takes all");
        assert_eq!(bytes.len(), 112 + 8);
        assert!(bytes.starts_with(b"07070100000001000081a4"));
        assert_eq!(&bytes[110..], b"a\0hello\0\0\0");
    }

    #[test]
    fn modules_are_named_without_their_folders_and_endings() {
        assert_eq!(module_name(Path::new("kernel/net/sched/sch-ingress.ko.xz")), "sch_ingress");
    }

    #[test]
    fn a_module_comes_after_those_it_needs() {
        let module = |name: &str, needs: &[&str]| {
            let needs = needs.iter().map(|need| (*need).to_owned()).collect();
            (name.to_owned(), (PathBuf::from(name), needs))
        };
        let all =
            BTreeMap::from([module("bridge", &["stp", "llc"]), module("stp", &["llc"]), module("llc", &[])]);
        let mut order = Vec::new();
        add("bridge", &all, &mut order);
        assert_eq!(order, ["llc", "stp", "bridge"].map(PathBuf::from));
    }
}
