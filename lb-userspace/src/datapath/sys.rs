//! bpf(2), for the commands that the eBPF library does not offer.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

const OBJ_GET: libc::c_long = 7;
const LINK_DETACH: libc::c_long = 34;

/// What BPF_OBJ_GET reads of `union bpf_attr`.
#[repr(C)]
struct ObjGet {
    path: u64,
    descriptor: u32,
    flags: u32,
}

/// What BPF_LINK_DETACH reads of it.
#[repr(C)]
struct LinkDetach {
    link: u32,
}

/// Calls the kernel; what it answers, if that is no error.
///
/// # Safety
/// The attributes are those of the command, and what they point to is valid for what the kernel does with it.
pub(super) unsafe fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes as many bytes of the attributes as it is told, and takes what lies beyond them
    // for zero; for the rest the caller vouches.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

/// Detaches the link that is pinned there, at once (Linux 5.11). One that only loses its last pin goes a moment later, when
/// the kernel gets to it, and holds its place until then.
pub(super) fn detach_link(pin: &Path) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut get = ObjGet { path: path.as_ptr() as u64, descriptor: 0, flags: 0 };
    // SAFETY: the path outlives the call, and ends with a zero; the kernel has just given us the descriptor.
    let link = unsafe { OwnedFd::from_raw_fd(bpf(OBJ_GET, &mut get)?) };
    let mut detach = LinkDetach { link: link.as_raw_fd() as u32 };
    // SAFETY: the attributes hold no pointers.
    unsafe { bpf(LINK_DETACH, &mut detach) }.map(drop)
}
