//! The order of modules that the crate's documentation states is the order of their imports.
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
        } else if path.extension().is_some_and(|e| e == "rs") {
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
    let others = ["lib.rs", "tests.rs"];
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
