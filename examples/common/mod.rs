//! What the examples share: dtypes on the command line, threads, memory, progress, charts.

#![allow(dead_code)] // no example needs all of it

pub(crate) mod chart;
pub(crate) mod dtype;
pub(crate) mod memory;

use indicatif::{ProgressBar, ProgressStyle};

/// Failures of an example, shown to its user.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Lets candle use every core unless RAYON_NUM_THREADS says otherwise.
///
/// Without that variable candle counts cores anew in every matrix product, which takes longer than
/// the products of small networks.  To be called first, before there are threads.
pub(crate) fn use_every_core() {
    const VARIABLE: &str = "RAYON_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        std::env::set_var(VARIABLE, cores.to_string());
    }
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
