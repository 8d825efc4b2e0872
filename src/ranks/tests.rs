use super::threads::on_ranks;
use super::*;

#[test]
fn shares_are_neighbours_and_nothing_is_left_out() {
    for count in 0..12 {
        let shares = on_ranks(5, |ranks| ranks.share(count));
        let all: Vec<usize> = shares.iter().cloned().flatten().collect();
        assert_eq!(all, (0..count).collect::<Vec<_>>());
        let sizes = || shares.iter().map(ExactSizeIterator::len);
        assert!(sizes().max() <= sizes().min().map(|least| least + 1));
    }
}

#[test]
fn what_is_gathered_comes_by_rank_with_all_its_bits() {
    let numbers = [f64::NAN, -0.0, 1.0 / 3.0, f64::MIN_POSITIVE / 8.0];
    let all = on_ranks(3, |ranks| {
        let own: Vec<f64> = numbers[..=ranks.rank()].to_vec();
        ranks.gather(Ok(own)).unwrap()
    });
    for by_rank in all {
        assert_eq!(by_rank.len(), 3);
        for (rank, own) in by_rank.iter().enumerate() {
            let bits = |numbers: &[f64]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(own), bits(&numbers[..=rank]));
        }
    }
}

#[test]
fn an_error_of_one_rank_ends_all_and_an_interruption_gives_way_to_it() {
    let errors = on_ranks(3, |ranks| {
        let own = match ranks.rank() {
            0 => Err(Error::Interrupted("interrupted".to_owned())),
            1 => Ok(vec![1u8]),
            _ => Err(Error::Data("the disk is full".to_owned())),
        };
        ranks.gather(own).unwrap_err()
    });
    for error in errors {
        assert_eq!(error.to_string(), "rank 2: the disk is full");
        assert_eq!(error.exit_code(), 3);
    }
}

#[test]
fn a_rank_that_gives_up_elsewhere_is_not_waited_for() {
    let errors = on_ranks(2, |ranks| match ranks.rank() {
        0 => ranks.agree("place", b"a").unwrap_err().to_string(),
        _ => {
            let error = Error::Internal("a bug".to_owned());
            ranks.tell(&error);
            // The others know: nothing more is sent.
            ranks.tell(&error);
            "told".to_owned()
        }
    });
    assert_eq!(errors, ["rank 1: a bug", "told"]);
}

#[test]
fn the_root_decides_and_ranks_that_differ_are_found() {
    let values = on_ranks(3, |ranks| {
        let rank = ranks.rank();
        let value = ranks.from_root(|| Ok(rank + 7)).unwrap();
        let made = ranks.on_root(|| Ok(rank)).unwrap();
        ranks.agree("value", &value.to_le_bytes()).unwrap();
        let digest = [u8::from(rank == 2)];
        let error = ranks.agree("state after step 4", &digest).unwrap_err();
        (value, made, error.to_string())
    });
    let error = "rank 2 has another state after step 4 than rank 0".to_owned();
    for (rank, value) in values.into_iter().enumerate() {
        assert_eq!(value, (7, (rank == 0).then_some(0), error.clone()));
    }
}

#[test]
fn alone_nothing_is_sent() {
    let ranks = Ranks::alone();
    assert_eq!(ranks.share(5), 0..5);
    assert_eq!(ranks.gather(Ok(vec![3])).unwrap(), [[3]]);
    assert_eq!(ranks.from_root(|| Ok(4)).unwrap(), 4);
    assert_eq!(ranks.bytes_sent(), 0);
    assert!(ranks.agree("place", b"a").is_ok());
}
