//! A repository over objects that are in no directory.

use super::*;
use crate::store::Usage;

#[test]
fn a_repository_is_made_and_opened_over_any_objects() {
    run(async {
        let space = Space::new(1);
        let p = space.process();
        space.lose("fspfs.json");
        let none = Repository::over(p.objects()).await.unwrap_err();
        assert_eq!(none.kind(), ErrorKind::NotFound);
        assert!(none.to_string().contains("the store memory is not a repository"), "{none}");
        p.lose_answer(0);
        let made = Repository::make(p.objects()).await.unwrap();
        assert!(p.has_lost());
        assert_eq!(kind(Repository::make(p.objects()).await), Some(ErrorKind::Conflict));
        assert_eq!(Repository::over(p.objects()).await.unwrap().id(), made.id());
    });
}

#[test]
fn objects_tell_what_is_worth_having_under_way_and_what_it_costs() {
    let p = Space::new(1).process();
    assert_eq!(p.parallelism(), 7);
    assert_eq!(p.usage(), Some(Usage { again: 3, ..Usage::default() }));
}
