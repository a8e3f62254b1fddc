//! Placeholder until the benches are here.

fn main() {}
