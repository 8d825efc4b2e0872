//! TEMP naive
pub struct TokenScores {
    pub logprob: f32,
    pub entropy: f32,
    pub lse: f32,
}
pub fn token_scores(row: &[f32], t: usize, inv: f32) -> TokenScores {
    let m = row.iter().copied().fold(f32::MIN, f32::max) * inv;
    let s: f64 = row.iter().map(|l| f64::from(l * inv - m).exp()).sum();
    let lse = m + s.ln() as f32;
    let e: f64 = row
        .iter()
        .map(|l| {
            let lp = f64::from(l * inv - lse);
            -lp * lp.exp()
        })
        .sum();
    TokenScores {
        logprob: row[t] * inv - lse,
        entropy: e as f32,
        lse,
    }
}
pub fn logits_gradient(row: &mut [f32], t: usize, inv: f32, lse: f32, c: f32) {
    for (i, l) in row.iter_mut().enumerate() {
        *l = c * inv * (f32::from(i == t) - (*l * inv - lse).exp());
    }
}
pub fn exp_shifted(x: &[f32], inv: f32, shift: f32, out: &mut [f32]) {
    for (o, x) in out.iter_mut().zip(x) {
        *o = (x * inv - shift).exp();
    }
}
