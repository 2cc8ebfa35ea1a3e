//! How much memory a container lets its processes have: the limits of Linux' control groups, of both versions.
//!
//! They are looked for where they are mounted by convention. Limits of groups above one's own, as far as they are to be seen, hold too.

use std::fs;
use std::path::{Component, Path};

/// The least of all memory limits of this process' groups, in bytes; `root` is the folder that is the system's root. `None` where
/// there is no limit, or nothing tells.
pub(crate) fn memory_limit(root: &Path) -> Option<u64> {
    // Without it the group at the mount is taken for one's own, as it is in a container.
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_else(|_| "0::/\n1:memory:/".into());
    let mounts = root.join("sys/fs/cgroup");
    let limits = groups.lines().filter_map(|line| {
        let (controllers, group) = line.split_once(':')?.1.split_once(':')?;
        match controllers {
            "" => least(&mounts, group, "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                least(&mounts.join("memory"), group, "memory.limit_in_bytes")
            }
            _ => None,
        }
    });
    limits.min()
}

/// The least number in `file` of a group and of those above it.
fn least(mount: &Path, group: &str, file: &str) -> Option<u64> {
    let group = Path::new(group.trim_start_matches('/'));
    // One that lies outside of what is mounted here has no folder here.
    let seen = group.components().all(|part| matches!(part, Component::Normal(_)));
    let folders = if seen { group } else { Path::new("") }.ancestors();
    folders.filter_map(|folder| number(&mount.join(folder).join(file))).min()
}

/// A limit, which is no number in version 2 where there is none, and an enormous one in version 1.
fn number(path: &Path) -> Option<u64> {
    let limit = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    (limit < 1 << 60).then_some(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The limit where these files are all that there is.
    fn limit(files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        memory_limit(root.path())
    }

    #[test]
    fn the_least_limit_of_a_group_and_those_above_it_holds() {
        let own = ("proc/self/cgroup", "0::/a/b\n");
        let [top, a, b] = ["sys/fs/cgroup/memory.max", "sys/fs/cgroup/a/memory.max", "sys/fs/cgroup/a/b/memory.max"];
        assert_eq!(limit(&[own, (a, "1000\n"), (b, "max\n")]), Some(1000));
        assert_eq!(limit(&[own, (a, "1000\n"), (b, "900\n")]), Some(900));
        assert_eq!(limit(&[own, (top, "7\n"), (b, "900\n")]), Some(7));
        assert_eq!(limit(&[own, (a, "max\n"), (b, "max\n")]), None);
    }

    #[test]
    fn a_container_sees_its_own_group_at_the_mount() {
        let file = "sys/fs/cgroup/memory.max";
        assert_eq!(limit(&[("proc/self/cgroup", "0::/\n"), (file, "5000\n")]), Some(5000));
        assert_eq!(limit(&[("proc/self/cgroup", "0::/../../x\n"), (file, "5000\n")]), Some(5000));
        // Without /proc.
        assert_eq!(limit(&[(file, "5000\n")]), Some(5000));
        assert_eq!(limit(&[]), None);
    }

    #[test]
    fn groups_of_version_1_have_limits_of_their_own() {
        let own = ("proc/self/cgroup", "12:cpu,cpuacct:/x\n9:memory:/docker/1\n0::/\n");
        let [top, inner] =
            ["sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes"];
        assert_eq!(limit(&[own, (inner, "4096\n"), (top, "9223372036854771712\n")]), Some(4096));
        assert_eq!(limit(&[own, (top, "8192\n")]), Some(8192));
        assert_eq!(limit(&[own, (inner, "9223372036854771712\n")]), None);
        assert_eq!(limit(&[own, (inner, "lots\n")]), None);
        assert_eq!(limit(&[(top, "8192\n")]), Some(8192));
    }
}
