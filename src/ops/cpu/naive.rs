//! TEMP naive
use crate::ops::Layout;
fn low(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |s, (a, b)| a.mul_add(*b, s))
}
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
#[allow(clippy::too_many_arguments)]
pub fn attention_backward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    o: &[f32],
    lse: &[f32],
    g: &[f32],
    layout: &Layout,
    nh: usize,
    n: usize,
    hd: usize,
    scale: f32,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let w = n * hd;
    for s in &layout.segments {
        let p = s.parent.map(|p| layout.segments[p]);
        let pl = p.map_or(0, |p| p.len);
        for i in 0..s.len {
            for h in 0..nh {
                let kh = h / (nh / n);
                let qi = ((s.start + i) * nh + h) * hd;
                let dd = low(&g[qi..][..hd], &o[qi..][..hd]);
                for j in 0..=pl + i {
                    let row = if j < pl {
                        p.unwrap().start + j
                    } else {
                        s.start + j - pl
                    };
                    let ki = row * w + kh * hd;
                    let pr = (scale * low(&q[qi..][..hd], &k[ki..][..hd])
                        - lse[(s.start + i) * nh + h])
                        .exp();
                    let ds = pr * (low(&g[qi..][..hd], &v[ki..][..hd]) - dd) * scale;
                    for d in 0..hd {
                        dv[ki + d] += pr * g[qi + d];
                        dq[qi + d] += ds * k[ki + d];
                        dk[ki + d] += ds * q[qi + d];
                    }
                }
            }
        }
    }
}
