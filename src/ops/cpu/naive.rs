//! TEMP naive
use crate::ops::{Layout, Span};
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
type Rows = Vec<f32>;
#[derive(Debug)]
struct Slot {
    parent: Option<(usize, usize)>,
    k: Rows,
    v: Rows,
}
#[derive(Debug)]
pub struct KvStore {
    n: usize,
    hd: usize,
    slots: Vec<Option<Slot>>,
}
impl KvStore {
    pub fn new(n: usize, hd: usize) -> Self {
        Self {
            n,
            hd,
            slots: vec![],
        }
    }
    pub fn alloc(&mut self, slot: usize, parent: Option<(usize, usize)>, _c: usize) {
        if self.slots.len() <= slot {
            self.slots.resize_with(slot + 1, || None)
        }
        self.slots[slot] = Some(Slot {
            parent,
            k: vec![],
            v: vec![],
        });
    }
    pub fn free(&mut self, slot: usize) {
        self.slots[slot] = None
    }
    pub fn append(&mut self, spans: &[Span], k: &[f32], v: &[f32]) {
        let w = self.n * self.hd;
        for s in spans {
            let slot = self.slots[s.slot].as_mut().unwrap();
            slot.k.extend_from_slice(&k[s.row * w..][..s.len * w]);
            slot.v.extend_from_slice(&v[s.row * w..][..s.len * w]);
        }
    }
    fn all(&self, slot: usize) -> (Rows, Rows) {
        let s = self.slots[slot].as_ref().unwrap();
        let w = self.n * self.hd;
        match s.parent {
            Some((p, l)) => {
                let p = self.slots[p].as_ref().unwrap();
                (
                    [&p.k[..l * w], &s.k].concat(),
                    [&p.v[..l * w], &s.v].concat(),
                )
            }
            None => (s.k.clone(), s.v.clone()),
        }
    }
}
pub fn attention_forward(
    q: &[f32],
    spans: &[Span],
    kv: &KvStore,
    nh: usize,
    scale: f32,
    out: &mut [f32],
    mut lse: Option<&mut [f32]>,
) {
    let (hd, w) = (kv.hd, kv.n * kv.hd);
    for s in spans {
        let (k, v) = kv.all(s.slot);
        for i in 0..s.len {
            for h in 0..nh {
                let kh = h / (nh / kv.n);
                let q = &q[((s.row + i) * nh + h) * hd..][..hd];
                let sc: Vec<f32> = (0..=s.pos + i)
                    .map(|j| scale * low(q, &k[j * w + kh * hd..][..hd]))
                    .collect();
                let m = sc.iter().copied().fold(f32::MIN, f32::max);
                let z: f32 = sc.iter().map(|x| (x - m).exp()).sum();
                let o = &mut out[((s.row + i) * nh + h) * hd..][..hd];
                for (j, x) in sc.iter().enumerate() {
                    let p = (x - m).exp() / z;
                    for d in 0..hd {
                        o[d] += p * v[j * w + kh * hd + d];
                    }
                }
                if let Some(l) = lse.as_deref_mut() {
                    l[(s.row + i) * nh + h] = m + z.ln();
                }
            }
        }
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
