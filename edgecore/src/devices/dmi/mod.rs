//! The device mapper interface: [`server`] is what mappers call, [`mapper`] what calls them.

mod mapper;
mod pace;
mod server;
#[cfg(test)]
mod tests;

pub(super) use self::mapper::{Links, keep, origin};
pub(super) use self::server::serve;
#[cfg(test)]
pub(super) use self::server::{info, key};
