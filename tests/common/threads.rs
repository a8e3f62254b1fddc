//! How many threads candle's products use in tests: one for each core, unless RAYON_NUM_THREADS says otherwise.

/// Sets the variable before there are threads.  Without it candle asks the system for the number of cores in every matrix
/// product, which is most of the time of many tests.
#[ctor::ctor(unsafe)]
fn set_the_number_of_threads() {
    const THREADS: &str = "RAYON_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        std::env::set_var(THREADS, cores.to_string());
    }
}
