//! The fuzz targets for the input of clients and operators: requests and configurations. `make
//! fuzz` runs them, and the tests run them over the kept corpora.

mod configuration;
mod request;

pub use configuration::configuration;
pub use request::request;
