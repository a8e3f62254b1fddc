//! What the examples share: flags, environment, reports, tables, charts, seeds, progress.
//!
//! An example flattens [`flags::Flags`] into its own, and its `main` is [`report::run`].

pub mod chart;
pub mod classes;
pub mod classifier;
pub mod conv;
pub mod dtype;
pub mod environment;
pub mod fit;
pub mod flags;
pub mod gradients;
pub mod idx;
pub mod initial;
pub mod jobs;
pub mod memory;
pub mod mnist;
pub mod mode;
pub mod model_equation;
pub mod momentum;
pub mod path_classifier;
pub mod plane;
pub mod problem;
pub mod random;
pub mod report;
pub mod table;
pub mod team;
pub mod threads;

use indicatif::{ProgressBar, ProgressStyle};

pub use problem::{relative, values};

/// Failures of an example, shown to its user.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Lets candle use every core unless RAYON_NUM_THREADS says otherwise, and the allocator keep what is freed.  To be called
/// first, before there are threads.
pub fn use_every_core() {
    threads::set_to_every_core();
    memory::keep_freed();
}

/// A progress bar on standard error, which shows nothing when that is no terminal.
pub fn progress(title: &str, length: usize) -> Result<ProgressBar> {
    let style = "{prefix:>6} {wide_bar} {pos:>5}/{len}  {msg}  {elapsed} of {duration}";
    let bar = ProgressBar::new(length as u64).with_style(ProgressStyle::with_template(style)?);
    Ok(bar.with_prefix(title.to_owned()))
}

/// The middle of some figures, NaN of none.
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Their mean, NaN of none.
pub fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / figures.len() as f64
}

/// exp of the mean logarithm, NaN of none: the mean of errors that differ in size.
pub fn geometric_mean(figures: &[f64]) -> f64 {
    let logarithms: Vec<f64> = figures.iter().map(|x| x.ln()).collect();
    mean(&logarithms).exp()
}
