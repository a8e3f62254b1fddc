//! How many threads candle and this crate use.

/// The variable that says so.
pub const THREADS: &str = "RAYON_NUM_THREADS";

/// Sets it to the number of cores unless it is set.  To be called before there are threads.
///
/// Without it candle asks the system for the number of cores in every matrix product, which takes longer than the products
/// of small networks.
pub fn set_to_every_core() {
    if std::env::var_os(THREADS).is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        std::env::set_var(THREADS, cores.to_string());
    }
}
