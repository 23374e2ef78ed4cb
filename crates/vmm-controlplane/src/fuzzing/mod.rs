//! The fuzz targets for what clients and operators write: requests and configurations. Run by `make fuzz`, and over the kept
//! corpora by the tests.

mod configuration;
mod request;

pub use configuration::configuration;
pub use request::request;
