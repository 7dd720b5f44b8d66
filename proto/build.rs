//! Generates the bindings of `wire/` and, with the features `cri` and `dmi`, of `cri/`, `health/` and `dmi/`. No protoc is needed: protox is a compiler in Rust.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=wire");
    println!("cargo:rerun-if-changed=cri");
    println!("cargo:rerun-if-changed=health");
    println!("cargo:rerun-if-changed=dmi");
    let wire = protox::compile(["link.proto"], ["wire"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(wire)?;
    if std::env::var_os("CARGO_FEATURE_CRI").is_some() {
        let cri = protox::compile(["cri.proto"], ["cri"])?;
        tonic_prost_build::configure().compile_fds(cri)?;
        let health = protox::compile(["health.proto"], ["health"])?;
        tonic_prost_build::configure().compile_fds(health)?;
    }
    if std::env::var_os("CARGO_FEATURE_DMI").is_some() {
        let dmi = protox::compile(["dmi.proto", "methods.proto", "reports.proto"], ["dmi"])?;
        tonic_prost_build::configure().compile_fds(dmi)?;
    }
    Ok(())
}
