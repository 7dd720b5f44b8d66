//! cloudcore: one process beside the apiserver that keeps edge nodes in step with it. See `cloudcore --help`.

use std::process::ExitCode;

/// glibc's allocator does not give back what many threads once needed.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    // The only failure is a provider that is installed already, and then it is this one.
    drop(rustls::crypto::ring::default_provider().install_default());
    cloudcore::cli::main()
}
