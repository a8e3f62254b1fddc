//! The order of modules that the crate's documentation states is the order of their imports; the names at its root are
//! few, each with a reason; files are short.
//!
//! `cargo test --test layering`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Modules in the order of the list under "Layout" in src/lib.rs.
fn documented() -> Vec<String> {
    let crate_root = fs::read_to_string("src/lib.rs").unwrap();
    let layout = crate_root.split("//! # Layout").nth(1).unwrap();
    let layout = layout.split("//! # ").next().unwrap();
    let lines = layout.lines().filter_map(|l| l.strip_prefix("//! * "));
    let names = lines.map(|line| line.split(':').next().unwrap());
    let quoted = names.flat_map(|names| names.split(", "));
    quoted.map(|name| name.trim_matches('`').into()).collect()
}

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path
            .extension()
            .is_some_and(|e| e == "rs" || e == "cu" || e == "cuh")
        {
            into.push(path);
        }
    }
}

/// The module of the crate's root that a file belongs to.
fn module_of(path: &Path) -> String {
    let inside = path.strip_prefix("src").unwrap();
    let first = inside.components().next().unwrap().as_os_str();
    first.to_str().unwrap().trim_end_matches(".rs").into()
}

/// The code of a file without comments and tests.
fn code(source: &str) -> String {
    let (mut kept, mut skipped) = (String::new(), false);
    for line in source.lines() {
        if line == "#[cfg(test)]" {
            skipped = true;
        } else if skipped && line.starts_with("mod tests {") {
            break;
        } else if skipped {
            // The statement, or the head of the block, that the attribute belongs to.
            skipped = !(line.ends_with(';') || line.ends_with('{') || line.ends_with(','));
        } else if !line.trim_start().starts_with("//") {
            kept += line;
            kept.push('\n');
        }
    }
    kept
}

/// What follows each `crate::`: one name, or the first names in braces.
fn imports(code: &str) -> Vec<String> {
    let name = |text: &str| -> String {
        let ends = |c: char| !(c.is_alphanumeric() || c == '_');
        text.split(ends).next().unwrap().into()
    };
    let mut found = vec![];
    for after in code.split("crate::").skip(1) {
        match after.strip_prefix('{') {
            Some(group) => {
                // Names in these braces, not in braces inside of them.
                let (mut depth, mut top) = (1, String::new());
                for c in group.chars() {
                    depth += i32::from(c == '{') - i32::from(c == '}');
                    match depth {
                        0 => break,
                        1 => top.push(c),
                        _ => {}
                    }
                }
                found.extend(top.split(',').map(|n| name(n.trim())));
            }
            None => found.push(name(after)),
        }
    }
    found
}

/// Pairs (module, what it uses) that are against the order.
fn against(order: &[String], files: &[(String, String)]) -> Vec<(String, String)> {
    let place: HashMap<_, _> = order
        .iter()
        .enumerate()
        .map(|(i, n)| (n.as_str(), i))
        .collect();
    let mut wrong = vec![];
    for (module, source) in files {
        for used in imports(&code(source)) {
            let (Some(here), Some(there)) = (place.get(module.as_str()), place.get(used.as_str()))
            else {
                continue;
            };
            if there > here {
                wrong.push((module.clone(), used));
            }
        }
    }
    wrong
}

fn files() -> Vec<(String, String)> {
    let mut paths = vec![];
    sources(Path::new("src"), &mut paths);
    let others = ["lib.rs", "tests.rs", "every_core.rs"];
    paths.retain(|p| !others.iter().any(|part| p.ends_with(part)));
    let read = |p: &PathBuf| (module_of(p), fs::read_to_string(p).unwrap());
    paths.iter().map(read).collect()
}

#[test]
fn every_module_uses_only_those_before_it_in_the_documented_order() {
    let order = documented();
    let files = files();
    for (module, _) in &files {
        assert!(
            order.contains(module),
            "{module} is not in the list of src/lib.rs"
        );
    }
    for module in &order {
        assert!(
            files.iter().any(|(m, _)| m == module),
            "{module} is listed and does not exist"
        );
    }
    let wrong = against(&order, &files);
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// The public names at the root: modules, and items that are exported there.
fn names_at_the_root() -> Vec<String> {
    let crate_root = fs::read_to_string("src/lib.rs").unwrap();
    let statements = code(&crate_root);
    // Of an inline module only its name is at the root.
    let (mut root, mut depth) = (String::new(), 0);
    for line in statements.lines() {
        let module = line.starts_with("pub mod ") && line.ends_with('{');
        if depth == 0 {
            root += line.trim_end_matches(if module { '{' } else { '\0' });
            root += if module { ";\n" } else { "\n" };
        }
        depth += i32::from(module) - i32::from(depth > 0 && line == "}");
    }
    let root = root.replace("#[doc(hidden)]\npub use", "hidden");
    let mut names = vec![];
    for statement in root.split(';') {
        let statement = statement.trim_start_matches(|c: char| c.is_whitespace());
        let last = statement.lines().last().unwrap_or_default();
        if let Some(module) = last.strip_prefix("pub mod ") {
            names.push(module.trim().into());
        } else if let Some(at) = statement.find("pub use ") {
            let path = &statement[at..];
            match path.split_once('{') {
                Some((_, list)) => {
                    let list = list.trim_end().trim_end_matches('}').split(',');
                    names.extend(list.map(|n| n.trim().to_owned()).filter(|n| !n.is_empty()));
                }
                None => names.extend(path.rsplit("::").next().map(|n| n.trim().into())),
            }
        }
    }
    names
}

/// The names in the first column of the table that DESIGN.md has of them.
fn names_with_a_reason() -> Vec<String> {
    let design = fs::read_to_string("DESIGN.md").unwrap();
    let table = design.split("## Names at the root").nth(1).unwrap();
    let rows = table.split("\n## ").next().unwrap().lines();
    let names = rows.filter_map(|row| row.strip_prefix("| `")?.split('|').next());
    let names = names.flat_map(|names| names.split(','));
    let name = |text: &str| text.trim_matches([' ', '`']).to_owned();
    names.map(name).collect()
}

#[test]
fn the_root_has_at_most_thirty_names_and_a_reason_for_each() {
    let (mut names, mut reasons) = (names_at_the_root(), names_with_a_reason());
    assert!(
        (20..=30).contains(&names.len()),
        "{}: {names:?}",
        names.len()
    );
    names.sort();
    reasons.sort();
    assert_eq!(names, reasons);
}

/// Every file of Rust and CUDA outside of tests, with the number of its lines.
fn lengths() -> Vec<(PathBuf, usize)> {
    let mut paths = vec![];
    for folder in ["src", "kernels", "examples", "benches"] {
        sources(Path::new(folder), &mut paths);
    }
    paths.retain(|path| !path.ends_with("tests.rs"));
    let lines = |path: &PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        let before_tests = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
        before_tests.lines().count()
    };
    paths
        .iter()
        .map(|path| (path.clone(), lines(path)))
        .collect()
}

#[test]
fn no_file_outside_tests_is_longer_than_500_lines() {
    let mut long = lengths();
    assert!(long.len() > 100);
    long.retain(|(_, lines)| *lines > 500);
    assert!(long.is_empty(), "{long:?}");
}

#[test]
fn an_import_against_the_order_is_found() {
    let order = ["below".to_owned(), "above".to_owned()];
    let file = |source: &str| [("below".to_owned(), source.to_owned())];
    let found = |source: &str| !against(&order, &file(source)).is_empty();
    assert!(found("use crate::above::Thing;"));
    assert!(found("use crate::{below, above};"));
    assert!(found("fn f() { crate::above::f() }"));
    assert!(found("use crate::{below::{A, B}, above};"));
    assert!(!found("// use crate::above::Thing;"));
    assert!(found(
        "#[cfg(feature = \"cuda\")]\nuse crate::above::Thing;"
    ));
    assert!(!found(
        "#[cfg(test)]\nmod tests {\n    use crate::above::Thing;\n}"
    ));
    assert!(found(
        "#[cfg(feature = \"cuda\")]\nuse std::mem;\nuse crate::above::Thing;"
    ));
}
