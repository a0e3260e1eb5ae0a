//! The waist: what a backend does for training and for answers, and the backends.

pub mod backends;
pub mod batch;
pub mod compute;
pub mod cpu;
pub mod gradients;
pub mod pages;
pub mod plain;
pub mod profile;
pub mod waist;
