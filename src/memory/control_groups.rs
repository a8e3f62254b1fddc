//! What the control groups of Linux leave this process: of every group that it is in, and of all that these are inside of.
//!
//! A limit of a group is for all processes in it and in the groups inside of it.  Pages of files that can be read again
//! are counted as used by the system, and given back when memory is short: they are no hindrance.
//!
//! "Control Group v2", "Memory Interface Files", and "Memory Resource Controller" (v1), in the documentation of the Linux
//! kernel.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// Where the groups are mounted.
const MOUNTED: &str = "/sys/fs/cgroup";

/// Bytes that all groups leave; the largest number where none of them has a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Left {
    memory: u64,
    swap: u64,
    /// Of memory and swap together.
    both: u64,
}

/// The files of a version of control groups.
struct Files {
    /// Limit and use: of memory, of swap, of both together.
    memory: [&'static str; 2],
    swap: Option<[&'static str; 2]>,
    both: Option<[&'static str; 2]>,
    /// Keys of `memory.stat`, of this group and those inside of it: pages of files.
    of_files: [&'static str; 2],
}

const V2: Files = Files {
    memory: ["memory.max", "memory.current"],
    swap: Some(["memory.swap.max", "memory.swap.current"]),
    both: None,
    of_files: ["inactive_file", "active_file"],
};

const V1: Files = Files {
    memory: ["memory.limit_in_bytes", "memory.usage_in_bytes"],
    swap: None,
    both: Some(["memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"]),
    of_files: ["total_inactive_file", "total_active_file"],
};

impl Left {
    /// Where there is no limit.
    const ALL: Self = Self {
        memory: u64::MAX,
        swap: u64::MAX,
        both: u64::MAX,
    };

    /// What the groups of this process leave.
    pub(super) fn here() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::of(Path::new(MOUNTED), &own)
    }

    /// The same of a process whose groups are these, by lines `number:controllers:path`, below this folder.
    fn of(mounted: &Path, own: &str) -> Self {
        let mut left = Self::ALL;
        for line in own.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
                continue;
            };
            // The one hierarchy of v2 has no controllers in its line; it is beside those of v1 where both are in use.
            let (roots, files): (&[&str], _) = match controllers {
                "" => (&["", "unified"], &V2),
                some if some.split(',').any(|name| name == "memory") => (&["memory"], &V1),
                _ => continue,
            };
            for root in roots {
                for group in groups(&mounted.join(root), path) {
                    left = left.least(files.left_by(&group));
                }
            }
        }
        left
    }

    fn least(self, other: Self) -> Self {
        Self {
            memory: self.memory.min(other.memory),
            swap: self.swap.min(other.swap),
            both: self.both.min(other.both),
        }
    }

    /// How much of what the machine has, in memory and in swap, can be had.
    pub(super) fn of_machine(self, memory: u64, swap: u64) -> u64 {
        let sum = memory.min(self.memory).saturating_add(swap.min(self.swap));
        sum.min(self.both)
    }
}

/// The folders of a group and of all that it is inside of, up to the root.
fn groups(root: &Path, path: &str) -> Vec<PathBuf> {
    let parts = Path::new(path).components();
    let names = parts.filter(|part| *part != Component::RootDir);
    let names: Option<Vec<_>> = names
        .map(|part| match part {
            Component::Normal(name) => Some(name),
            // A group outside of what is mounted here.
            _ => None,
        })
        .collect();
    let mut all = vec![root.to_owned()];
    for name in names.unwrap_or_default() {
        all.push(all[all.len() - 1].join(name));
    }
    all
}

impl Files {
    /// What one group leaves.  A file that is not there, and one that says `max`, limits nothing.
    fn left_by(&self, group: &Path) -> Left {
        let number = |file: &str| -> Option<u64> {
            let text = fs::read_to_string(group.join(file)).ok()?;
            text.trim().parse().ok()
        };
        let of_files = || -> u64 {
            let text = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            let values = text.lines().filter_map(|line| line.split_once(' '));
            let values = values.filter(|(key, _)| self.of_files.contains(key));
            values
                .filter_map(|(_, value)| value.parse::<u64>().ok())
                .sum()
        };
        let left = |[limit, usage]: [&str; 2], can_be_freed: &dyn Fn() -> u64| {
            let limit = number(limit)?;
            let used = number(usage).unwrap_or(0).saturating_sub(can_be_freed());
            Some(limit.saturating_sub(used))
        };
        let swap = self.swap.and_then(|swap| left(swap, &|| 0));
        let both = self.both.and_then(|both| left(both, &of_files));
        Left {
            memory: left(self.memory, &of_files).unwrap_or(u64::MAX),
            swap: swap.unwrap_or(u64::MAX),
            both: both.unwrap_or(u64::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A tree of folders with files in them.
    fn tree(files: &[(&str, String)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn file(path: &'static str, bytes: u64) -> (&'static str, String) {
        (path, format!("{bytes}\n"))
    }

    fn unlimited(path: &'static str) -> (&'static str, String) {
        (path, "max\n".to_owned())
    }

    fn stat(path: &'static str, text: &str) -> (&'static str, String) {
        (path, text.to_owned())
    }

    #[test]
    fn the_tightest_of_nested_groups_limits_memory_and_swap() {
        let root = tree(&[
            unlimited("job/memory.max"),
            file("job/memory.current", 9 * GIB),
            file("job/memory.swap.max", 3 * GIB),
            file("job/memory.swap.current", 2 * GIB),
            file("job/step/memory.max", 8 * GIB),
            file("job/step/memory.current", 7 * GIB),
            stat(
                "job/step/memory.stat",
                "anon 1073741824\nfile 6442450944\ninactive_file 4294967296\nactive_file 1073741824\n",
            ),
            file("job/step/memory.swap.max", 2 * GIB),
            file("job/step/memory.swap.current", GIB / 2),
            file("job/step/task/memory.max", 64 * GIB),
            file("job/step/task/memory.current", GIB),
            unlimited("job/step/task/memory.swap.max"),
            file("job/step/task/memory.swap.current", 0),
            // Of another process.
            file("job/other/memory.max", GIB),
            file("job/other/memory.current", GIB),
        ]);
        let left = Left::of(root.path(), "0::/job/step/task\n");
        // 8 − (7 − 4 − 1) of the group between; 3 − 2 of the outer one.
        let expected = Left {
            memory: 6 * GIB,
            swap: GIB,
            both: u64::MAX,
        };
        assert_eq!(left, expected);
        assert_eq!(left.of_machine(100 * GIB, 100 * GIB), 7 * GIB);
        assert_eq!(left.of_machine(2 * GIB, 0), 2 * GIB);
        assert_eq!(Left::of(root.path(), "0::/job\n").memory, u64::MAX);
    }

    #[test]
    fn a_group_that_may_not_swap_has_its_memory_alone() {
        let root = tree(&[
            file("memory.max", 4 * GIB),
            file("memory.current", GIB),
            file("memory.swap.max", 0),
            file("memory.swap.current", 0),
        ]);
        // Inside of a container the path may be that outside of it.
        for own in ["0::/", "0::/docker/0123\n", "0::/../../elsewhere"] {
            let left = Left::of(root.path(), own);
            assert_eq!(left.of_machine(64 * GIB, 64 * GIB), 3 * GIB, "{own}");
        }
    }

    #[test]
    fn groups_of_the_first_version_limit_memory_and_both_together() {
        let own = "7:cpu,cpuacct:/a/b\n4:hugetlb,memory:/a/b\n0::/a\n";
        let root = tree(&[
            file("memory/memory.limit_in_bytes", 9223372036854771712),
            file("memory/memory.usage_in_bytes", 50 * GIB),
            file("memory/a/memory.limit_in_bytes", 6 * GIB),
            file("memory/a/memory.usage_in_bytes", 3 * GIB),
            file("memory/a/memory.memsw.limit_in_bytes", 7 * GIB),
            file("memory/a/memory.memsw.usage_in_bytes", 4 * GIB),
            stat(
                "memory/a/memory.stat",
                "inactive_file 1\ntotal_inactive_file 1073741824\ntotal_active_file 0\n",
            ),
            file("memory/a/b/memory.limit_in_bytes", 6 * GIB),
            file("memory/a/b/memory.usage_in_bytes", GIB),
        ]);
        let left = Left::of(root.path(), own);
        assert_eq!((left.memory, left.both), (4 * GIB, 4 * GIB));
        assert_eq!(left.of_machine(64 * GIB, 64 * GIB), 4 * GIB);
        assert_eq!(left.of_machine(2 * GIB, GIB), 3 * GIB);
    }

    #[test]
    fn what_is_not_there_or_not_read_limits_nothing() {
        let root = tree(&[
            file("a/memory.max", GIB),
            stat("b/memory.max", "what\n"),
            file("b/memory.current", GIB),
        ]);
        let nonsense = "nonsense\n:\n4:memory";
        for own in ["", "0::/b", "0::/c", nonsense, "9:pids:/a"] {
            assert_eq!(Left::of(root.path(), own), Left::ALL, "{own:?}");
        }
        // A limit is one even where nobody says what is used of it.
        assert_eq!(Left::of(root.path(), "0::/a").memory, GIB);
    }
}
