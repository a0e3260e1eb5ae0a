//! Floats of metadata as JSON has them.

use serde_json::{Value, json};

/// A number that JSON may not have: not finite ones stand as their names, which no field takes.
pub fn number(value: f32) -> Value {
    let decimal = decimal(value);
    if decimal.is_finite() { json!(decimal) } else { json!(decimal.to_string()) }
}

/// The decimal that an f32 was written from: 1e-5_f32 is 1e-5, not 9.99999974e-6.
pub fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
