use std::ops::{Index, IndexMut};

/// A dense row-major tensor `[batch, heads, rows, columns]`.
///
/// Everything in this crate has four axes: a log-sum-exp is `[B, H, L, 1]`, a block map
/// `[B, H, M, N]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: [usize; 4],
    data: Vec<f64>,
}

impl Tensor {
    /// Zeros of `shape`.
    pub fn zeros(shape: [usize; 4]) -> Self {
        Self::full(shape, 0.0)
    }

    /// `value` everywhere.
    pub fn full(shape: [usize; 4], value: f64) -> Self {
        Self {
            shape,
            data: vec![value; shape.iter().product()],
        }
    }

    /// A tensor over `data`, row-major.
    ///
    /// # Panics
    /// If `data` does not have `shape`'s number of elements.
    pub fn new(shape: [usize; 4], data: Vec<f64>) -> Self {
        assert_eq!(
            data.len(),
            shape.iter().product::<usize>(),
            "data does not fill {shape:?}"
        );
        Self { shape, data }
    }

    /// A tensor computed from its index.
    pub fn from_fn(shape: [usize; 4], mut value: impl FnMut([usize; 4]) -> f64) -> Self {
        let mut data = Vec::with_capacity(shape.iter().product());
        for b in 0..shape[0] {
            for h in 0..shape[1] {
                for i in 0..shape[2] {
                    for j in 0..shape[3] {
                        data.push(value([b, h, i, j]));
                    }
                }
            }
        }
        Self { shape, data }
    }

    /// `[batch, heads, rows, columns]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// All elements, row-major.
    pub fn data(&self) -> &[f64] {
        &self.data
    }

    /// Row `i` of head `h` of batch `b`.
    pub fn row(&self, b: usize, h: usize, i: usize) -> &[f64] {
        let start = self.offset([b, h, i, 0]);
        &self.data[start..start + self.shape[3]]
    }

    /// Row `i` of head `h` of batch `b`, to write.
    pub fn row_mut(&mut self, b: usize, h: usize, i: usize) -> &mut [f64] {
        let start = self.offset([b, h, i, 0]);
        &mut self.data[start..start + self.shape[3]]
    }

    /// Element-wise image.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self {
            shape: self.shape,
            data: self.data.iter().map(|&x| f(x)).collect(),
        }
    }

    fn offset(&self, [b, h, i, j]: [usize; 4]) -> usize {
        let [_, heads, rows, columns] = self.shape;
        ((b * heads + h) * rows + i) * columns + j
    }
}

impl Index<[usize; 4]> for Tensor {
    type Output = f64;

    fn index(&self, at: [usize; 4]) -> &f64 {
        &self.data[self.offset(at)]
    }
}

impl IndexMut<[usize; 4]> for Tensor {
    fn index_mut(&mut self, at: [usize; 4]) -> &mut f64 {
        let offset = self.offset(at);
        &mut self.data[offset]
    }
}

/// `|value - expected| / |expected|` in the Euclidean norm; the plain norm of the difference where
/// `expected` is zero.
///
/// Elements that are the same infinity on both sides agree; a NaN on either side makes the result
/// NaN, so that no comparison with a bound passes.
pub fn relative_error(value: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(value.len(), expected.len(), "tensors of different sizes");
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&x, &y) in value.iter().zip(expected) {
        if x == y {
            norm += if y.is_finite() { y * y } else { 0.0 };
            continue;
        }
        difference += (x - y) * (x - y);
        norm += y * y;
    }
    let (difference, norm) = (difference.sqrt(), norm.sqrt());
    if norm == 0.0 {
        difference
    } else {
        difference / norm
    }
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// `y += a * x`.
pub(crate) fn axpy(y: &mut [f64], a: f64, x: &[f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Central differences of `loss` in every element of `inputs[at]`.
/// Cosine of the angle between two results, neither of which is 0.
pub fn cosine(value: &[f64], expected: &[f64]) -> f64 {
    dot(value, expected) / (dot(value, value) * dot(expected, expected)).sqrt()
}

/// The L1 norm of the difference, relative to that of `expected`, which is not 0.
pub fn relative_l1(value: &[f64], expected: &[f64]) -> f64 {
    let pairs = value.iter().zip(expected);
    let difference: f64 = pairs.map(|(x, y)| (x - y).abs()).sum();
    difference / expected.iter().map(|y| y.abs()).sum::<f64>()
}

#[cfg(test)]
pub(crate) fn differences<const N: usize>(
    inputs: &mut [Tensor; N],
    at: usize,
    loss: impl Fn(&[Tensor; N]) -> f64,
) -> Tensor {
    let step = 1e-6;
    Tensor::from_fn(inputs[at].shape(), |index| {
        let x = inputs[at][index];
        inputs[at][index] = x + step;
        let up = loss(inputs);
        inputs[at][index] = x - step;
        let down = loss(inputs);
        inputs[at][index] = x;
        (up - down) / (2.0 * step)
    })
}
