//! Directories and files that are this user's alone: nothing that others could have put there is read, written or
//! followed.

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Error, ErrorKind, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Links that are followed on the way to a directory, as many as the kernel follows.
const MAX_LINKS: u32 = 40;

/// What others may not have: writing, as the group or as anybody.
const WRITTEN_BY_OTHERS: u32 = 0o022;

/// What lets nobody remove or rename what is another's in a directory that many can write.
const STICKY: u32 = 0o1000;

/// Makes a directory, private, with those above it that are missing; one that is there has to be this user's own.
///
/// # Errors
///
/// Those of [`check`].
pub(crate) fn make(path: &Path) -> io::Result<()> {
    walk(path, true, true, 0)
}

/// Checks that a directory is this user's own, and that nobody else can write to it, or put another in its place: all
/// above it, and all links that lead to it, are root's or this user's, and others can write only to what is sticky.
///
/// # Errors
///
/// `PermissionDenied` with the path and the cure; whatever the system says.
pub(crate) fn check(path: &Path) -> io::Result<()> {
    walk(path, false, true, 0)
}

/// Goes down to `path`, which is this user's `own`, or only on the way to what is.
fn walk(path: &Path, make: bool, own: bool, links: u32) -> io::Result<()> {
    let path = std::path::absolute(path)?;
    let mut above: Vec<_> = path.ancestors().collect();
    above.reverse();
    for at in above {
        let found = match at.symlink_metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound && make => {
                match DirBuilder::new().mode(0o700).create(at) {
                    Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                    _ => at.symlink_metadata()?,
                }
            }
            found => found?,
        };
        let own = own && at == path;
        if found.is_symlink() {
            if !is_ours_or_roots(&found) {
                return Err(refused(at, "is a link of another user"));
            }
            if links == MAX_LINKS {
                return Err(Error::from_raw_os_error(libc::ELOOP));
            }
            let target = at.parent().unwrap_or(at).join(std::fs::read_link(at)?);
            walk(&target, make, own, links + 1)?;
        } else {
            check_directory(at, &found, own)?;
        }
    }
    Ok(())
}

fn check_directory(at: &Path, found: &Metadata, own: bool) -> io::Result<()> {
    if !found.is_dir() {
        return Err(Error::from_raw_os_error(libc::ENOTDIR));
    }
    if own {
        if !is_ours(found) {
            return Err(refused(at, "belongs to another user"));
        }
        if found.mode() & WRITTEN_BY_OTHERS != 0 {
            return Err(refused(at, "can be written by others (`chmod go-w` it)"));
        }
    } else if !is_ours_or_roots(found) {
        return Err(refused(at, "belongs to another user"));
    } else if found.mode() & STICKY == 0 {
        // What a group of one may write is as usual as a umask of 002.
        let own_group = found.gid() == nix::unistd::getegid().as_raw();
        let others = if own_group { 0o002 } else { WRITTEN_BY_OTHERS };
        if found.mode() & others != 0 {
            return Err(refused(at, "can be written by others"));
        }
    }
    Ok(())
}

/// Opens a file as `options` say, which do not cut it. It is this user's own, others cannot write to it, and it has no
/// other name.
///
/// # Errors
///
/// `PermissionDenied` with the path and the cure, if it is a link, no file, or not so; whatever the system says.
pub(crate) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    // A pipe would be waited for.
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path).map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP) => refused(path, "is a link (remove it)"),
        _ => error,
    })?;
    check_file(path, &file.metadata()?)?;
    Ok(file)
}

fn check_file(path: &Path, found: &Metadata) -> io::Result<()> {
    let why = match () {
        () if !found.is_file() => "is no file (remove it)",
        () if !is_ours(found) => "belongs to another user (remove it)",
        () if found.mode() & WRITTEN_BY_OTHERS != 0 => {
            "can be written by others (`chmod go-w` it, if it is as you left it)"
        }
        () if found.nlink() > 1 => "has another name, too (remove it)",
        () => return Ok(()),
    };
    Err(refused(path, why))
}

/// Reads a file, as [`open`] opens it.
///
/// # Errors
///
/// Those of [`open`].
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path, OpenOptions::new().read(true))?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn is_ours(found: &Metadata) -> bool {
    found.uid() == nix::unistd::geteuid().as_raw()
}

fn is_ours_or_roots(found: &Metadata) -> bool {
    found.uid() == 0 || is_ours(found)
}

fn refused(path: &Path, why: &str) -> Error {
    let whose = match nix::unistd::geteuid() {
        root if root.is_root() => "root's own (with sudo, leave out -E)".to_owned(),
        user => format!("the own of user {user}"),
    };
    let message = format!(
        "{} {why}; others could put there what they like, so use a directory that is {whose}, below directories that nobody else can change",
        path.display()
    );
    Error::new(ErrorKind::PermissionDenied, message)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
    use std::path::PathBuf;

    use nix::sys::stat::Mode;
    use nix::unistd::{Uid, mkfifo};

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn is_refused(path: &Path, why: &str) {
        let error = make(path).unwrap_err();
        let said = error.to_string();
        assert!(error.kind() == ErrorKind::PermissionDenied && said.contains(why), "{said}");
        assert!(check(path).is_err(), "{}", path.display());
    }

    #[test]
    fn a_directory_is_made_for_this_user_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        assert_eq!(check(&path).unwrap_err().kind(), ErrorKind::NotFound);
        make(&path).unwrap();
        for path in [&path, &dir.path().join("a")] {
            assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o700);
        }
        make(&path).and_then(|()| check(&path)).unwrap();
        // A link of one's own is no danger.
        symlink("a", dir.path().join("link")).unwrap();
        make(&dir.path().join("link/b/c")).and_then(|()| check(&dir.path().join("link"))).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(make(&dir.path().join("file")).is_err());
        symlink("loop", dir.path().join("loop")).unwrap();
        assert!(make(&dir.path().join("loop")).is_err());
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (shared, own) = (dir.path().join("shared"), dir.path().join("shared/own"));
        make(&own).unwrap();
        for mode in [0o777, 0o720, 0o702, 0o1777] {
            set_mode(&shared, mode);
            is_refused(&shared, "chmod go-w");
        }
        set_mode(&shared, 0o777);
        is_refused(&own, "shared can be written by others");
        is_refused(&own.join("new"), "shared can be written by others");
        // There it is the directory itself that counts.
        set_mode(&shared, 0o1777);
        make(&own).unwrap();
        // As a umask of 002 makes it.
        set_mode(&shared, 0o775);
        chown(&shared, None, Some(nix::unistd::getegid().as_raw())).unwrap();
        make(&own).unwrap();
    }

    #[test]
    fn directories_links_and_files_of_another_user_are_refused() {
        if !Uid::effective().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let give = |path: &PathBuf| std::os::unix::fs::lchown(path, Some(65534), None).unwrap();
        make(&at("theirs/ours")).unwrap();
        make(&at("ours")).unwrap();
        symlink("ours", at("link")).unwrap();
        std::fs::write(at("ours/file"), "x").unwrap();
        for path in [at("theirs"), at("link"), at("ours/file")] {
            give(&path);
        }
        is_refused(&at("theirs"), "theirs belongs to another user");
        is_refused(&at("theirs/ours"), "theirs belongs to another user");
        is_refused(&at("theirs/new"), "leave out -E");
        is_refused(&at("link"), "link is a link of another user");
        is_refused(&at("link/new"), "link is a link of another user");
        assert!(!at("theirs/new").exists() && !at("ours/new").exists());
        let said = read(&at("ours/file")).unwrap_err().to_string();
        assert!(said.contains("file belongs to another user"), "{said}");
    }

    #[test]
    fn a_file_is_opened_that_nobody_else_has_to_do_with() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "x").unwrap();
        assert_eq!(read(&at("file")).unwrap(), b"x");
        symlink("file", at("link")).unwrap();
        std::fs::write(at("one"), "x").unwrap();
        std::fs::hard_link(at("one"), at("two")).unwrap();
        std::fs::write(at("open"), "x").unwrap();
        set_mode(&at("open"), 0o606);
        mkfifo(&at("pipe"), Mode::S_IRWXU).unwrap();
        for (name, why) in [
            ("link", "is a link"),
            ("one", "has another name"),
            ("open", "can be written by others"),
            ("pipe", "is no file"),
        ] {
            let mut options = OpenOptions::new();
            let opened =
                [read(&at(name)).map(drop), open(&at(name), options.append(true)).map(drop)];
            for error in opened.map(Result::unwrap_err) {
                // Nobody reads the pipe.
                let is_pipe = error.raw_os_error() == Some(libc::ENXIO);
                assert!(is_pipe || error.to_string().contains(why), "{error}");
            }
        }
        assert_eq!(read(&at("no")).unwrap_err().kind(), ErrorKind::NotFound);
        let made = open(&at("new"), OpenOptions::new().write(true).create(true).mode(0o600));
        assert_eq!(made.unwrap().metadata().unwrap().mode() & 0o777, 0o600);
    }
}
