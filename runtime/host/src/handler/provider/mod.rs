//! What handlers of all providers have in common: the endpoint, a request that is made and read by a thread of its own, and the refusals
//! of many servers.

mod egress;
pub(super) mod endpoint;
pub(super) mod piece;
pub(super) mod reading;
pub(super) mod refusal;

pub use self::endpoint::{BaseUrl, Endpoint};
