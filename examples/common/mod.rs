//! What the examples share: flags, environment, reports, tables, charts, seeds, progress.
//!
//! An example flattens [`flags::Flags`] into its own, and its `main` is [`report::run`].

#![allow(dead_code, unused_imports)] // no example needs all of it

pub(crate) mod chart;
pub(crate) mod classes;
pub(crate) mod classifier;
pub(crate) mod conv;
pub(crate) mod dtype;
pub(crate) mod environment;
pub(crate) mod fit;
pub(crate) mod flags;
pub(crate) mod gradients;
pub(crate) mod idx;
pub(crate) mod initial;
pub(crate) mod jobs;
pub(crate) mod memory;
pub(crate) mod mnist;
pub(crate) mod mode;
pub(crate) mod model_equation;
pub(crate) mod momentum;
pub(crate) mod path_classifier;
pub(crate) mod plane;
pub(crate) mod problem;
pub(crate) mod random;
pub(crate) mod report;
pub(crate) mod table;
pub(crate) mod team;
pub(crate) mod threads;

use indicatif::{ProgressBar, ProgressStyle};

pub(crate) use problem::{relative, values};

/// Failures of an example, shown to its user.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Lets candle use every core unless RAYON_NUM_THREADS says otherwise, and the allocator keep what is freed.  To be called
/// first, before there are threads.
pub(crate) fn use_every_core() {
    threads::set_to_every_core();
    memory::keep_freed();
}

/// A progress bar on standard error, which shows nothing when that is no terminal.
pub(crate) fn progress(title: &str, length: usize) -> Result<ProgressBar> {
    let style = "{prefix:>6} {wide_bar} {pos:>5}/{len}  {msg}  {elapsed} of {duration}";
    let bar = ProgressBar::new(length as u64).with_style(ProgressStyle::with_template(style)?);
    Ok(bar.with_prefix(title.to_owned()))
}

/// The middle of some figures, NaN of none.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Their mean, NaN of none.
pub(crate) fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / figures.len() as f64
}

/// exp of the mean logarithm, NaN of none: the mean of errors that differ in size.
pub(crate) fn geometric_mean(figures: &[f64]) -> f64 {
    let logarithms: Vec<f64> = figures.iter().map(|x| x.ln()).collect();
    mean(&logarithms).exp()
}
