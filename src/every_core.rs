//! Tests use every core: without the variable that says so, candle's question for the number of cores is most of the time of
//! many tests.

/// Sets it before there are threads.
#[ctor::ctor(unsafe)]
fn use_every_core() {
    const THREADS: &str = "RAYON_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        std::env::set_var(THREADS, cores.to_string());
    }
}
