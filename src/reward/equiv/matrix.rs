//! Sums and products, which for matrices are worked out entry by entry while parsing.

use super::node::Node;

/// Entries of a matrix that is worked out, and matrices of one product: more are not read.
const MAX_ENTRIES: usize = 36;
const MAX_FACTORS: usize = 4;
/// Nodes of a product of matrices, whose entries repeat those of its factors.
const MAX_NODES: usize = 4000;

/// A sum of scalars, or of matrices of one shape; `None` for a mixture.
pub(super) fn sum(terms: Vec<Node>) -> Option<Node> {
    if terms.iter().all(|term| entries(term).is_none()) {
        return Some(Node::Sum(terms));
    }
    let mut total: Option<Vec<Vec<Node>>> = None;
    for term in terms {
        let (negative, rows) = match term {
            Node::Matrix(rows) => (false, rows),
            Node::Neg(inner) => match *inner {
                Node::Matrix(rows) => (true, rows),
                _ => return None,
            },
            _ => return None,
        };
        let rows = map(rows, |entry| if negative { entry.negated() } else { entry });
        total = Some(match total {
            None => rows,
            Some(left) => add(left, rows)?,
        });
    }
    total.map(Node::Matrix)
}

/// A product of scalars, or of scalars and matrices.
pub(super) fn product(factors: Vec<Node>) -> Option<Node> {
    if factors.iter().all(|factor| entries(factor).is_none()) {
        return Some(Node::Product(factors));
    }
    if factors
        .iter()
        .filter(|factor| entries(factor).is_some())
        .count()
        > MAX_FACTORS
    {
        return None;
    }
    let mut scalars = Vec::new();
    let mut matrix: Option<Vec<Vec<Node>>> = None;
    for factor in factors {
        match factor {
            Node::Matrix(rows) => {
                matrix = Some(match matrix {
                    None => rows,
                    Some(left) => multiply(&left, &rows)?,
                });
            }
            scalar if entries(&scalar).is_none() => scalars.push(scalar),
            _ => return None,
        }
    }
    let rows = matrix?;
    let entries: usize = rows.iter().map(Vec::len).sum();
    if !scalars.is_empty() && entries * size(&scalars) > MAX_NODES {
        return None;
    }
    Some(Node::Matrix(map(rows, |entry| {
        let factors = scalars.iter().cloned().chain([entry]).collect::<Vec<_>>();
        if factors.len() == 1 {
            factors.into_iter().next().unwrap_or(Node::integer(1))
        } else {
            Node::Product(factors)
        }
    })))
}

pub(super) fn transpose(node: Node) -> Option<Node> {
    let Node::Matrix(rows) = node else {
        return None;
    };
    let width = rows.first()?.len();
    if rows.iter().any(|row| row.len() != width) {
        return None;
    }
    let mut columns: Vec<Vec<Node>> = (0..width).map(|_| Vec::new()).collect();
    for row in rows {
        for (column, entry) in columns.iter_mut().zip(row) {
            column.push(entry);
        }
    }
    Some(Node::Matrix(columns))
}

/// Nodes of all the trees.
fn size(nodes: &[Node]) -> usize {
    nodes
        .iter()
        .map(|node| {
            1 + node
                .children()
                .into_iter()
                .map(|c| size(std::slice::from_ref(c)))
                .sum::<usize>()
        })
        .sum()
}

/// Whether an environment is a matrix that can be read.
pub(super) fn is_environment(name: &str) -> bool {
    matches!(
        name,
        "matrix"
            | "pmatrix"
            | "bmatrix"
            | "Bmatrix"
            | "vmatrix"
            | "Vmatrix"
            | "smallmatrix"
            | "array"
    )
}

/// The rows of a matrix or of its negative or reciprocal.
fn entries(node: &Node) -> Option<&Vec<Vec<Node>>> {
    match node {
        Node::Matrix(rows) => Some(rows),
        Node::Neg(inner) | Node::Recip(inner) => entries(inner),
        _ => None,
    }
}

fn map(rows: Vec<Vec<Node>>, change: impl Fn(Node) -> Node) -> Vec<Vec<Node>> {
    rows.into_iter()
        .map(|row| row.into_iter().map(&change).collect())
        .collect()
}

fn add(left: Vec<Vec<Node>>, right: Vec<Vec<Node>>) -> Option<Vec<Vec<Node>>> {
    let shape = |rows: &[Vec<Node>]| rows.iter().map(Vec::len).collect::<Vec<_>>();
    if shape(&left) != shape(&right) {
        return None;
    }
    let pair = |(a, b): (Vec<Node>, Vec<Node>)| {
        a.into_iter()
            .zip(b)
            .map(|(a, b)| Node::Sum(vec![a, b]))
            .collect()
    };
    Some(left.into_iter().zip(right).map(pair).collect())
}

fn multiply(left: &[Vec<Node>], right: &[Vec<Node>]) -> Option<Vec<Vec<Node>>> {
    let width = right.first()?.len();
    let fits = left.iter().all(|row| row.len() == right.len())
        && right.iter().all(|row| row.len() == width);
    let nodes = width * left.iter().map(|row| size(row)).sum::<usize>()
        + left.len() * right.iter().map(|row| size(row)).sum::<usize>();
    if !fits || left.len() * width > MAX_ENTRIES || nodes > MAX_NODES {
        return None;
    }
    let entry = |row: &Vec<Node>, column: usize| {
        let term = |(a, b): (&Node, &Vec<Node>)| Node::Product(vec![a.clone(), b[column].clone()]);
        Node::Sum(row.iter().zip(right).map(term).collect())
    };
    Some(
        left.iter()
            .map(|row| (0..width).map(|column| entry(row, column)).collect())
            .collect(),
    )
}
