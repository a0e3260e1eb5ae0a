//! The plain backend: blocks as compositions of candle operations, which run any recipe and are what others are held to.

pub mod answer;
pub mod attention;
pub(crate) mod block;
pub mod decoder;
pub mod frozen_linear;
pub(crate) mod linear;
mod noise;
pub mod recipe;
pub(crate) mod tape;
pub mod train;
