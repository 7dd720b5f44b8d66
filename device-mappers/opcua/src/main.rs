//! The OPC UA mapper. See README.md for its keys.

use std::process::ExitCode;

fn main() -> ExitCode {
    skerry_mapper::run(skerry_mapper_opcua::OpcUa)
}
