//! Reading of the JSON fixtures in the tests of this folder.

use serde_json::Value;

pub fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// An array of numbers; `null` is NaN.
pub fn numbers(value: &Value) -> Vec<f64> {
    let array = value
        .as_array()
        .unwrap_or_else(|| panic!("no array: {value}"));
    array
        .iter()
        .map(|v| v.as_f64().unwrap_or(f64::NAN))
        .collect()
}

pub fn rows(value: &Value) -> Vec<Vec<f64>> {
    value.as_array().unwrap().iter().map(numbers).collect()
}

/// |got − expected| ≤ tolerance · max(1, |expected|); NaN equals NaN.
pub fn assert_close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (g, e) in got.iter().zip(expected) {
        let same = (g.is_nan() && e.is_nan()) || (g - e).abs() <= tolerance * e.abs().max(1.0);
        assert!(same, "{what}: {got:?} instead of {expected:?}");
    }
}
