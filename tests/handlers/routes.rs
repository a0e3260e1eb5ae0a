//! Routes: which handler answers, and when the next one does.

use super::*;

#[test]
fn a_route_falls_back_before_the_first_word_and_never_after() -> Result<()> {
    let start = Event::start("broken", "broken", "broken");
    let word = Event::text("half");
    let near = local()?;
    let want = near.complete(&asked("hi", 5), &Context::default())?.text().to_owned();
    for (before, kind, falls_back) in [
        (vec![], Kind::Unavailable, true),
        (vec![], Kind::Timeout, true),
        (vec![], Kind::RateLimited { retry_after: None }, true),
        (vec![start.clone()], Kind::Unavailable, true),
        (vec![], Kind::Authentication, false),
        (vec![], Kind::InvalidRequest { param: None }, false),
        (vec![], Kind::ContextLength, false),
        (vec![start.clone()], Kind::Cut, true),
        (vec![], Kind::Protocol, true),
        (vec![start.clone()], Kind::ContextLength, false),
        (vec![start.clone(), word.clone()], Kind::Unavailable, false),
        (vec![start.clone(), word.clone()], Kind::Cut, false),
    ] {
        let asked_times = Arc::new(AtomicUsize::new(0));
        let error = HandlerError::new(kind.clone(), "broken");
        let broken: Arc<dyn Handler> = Arc::new(Fails { before: before.clone(), error, asked: asked_times.clone() });
        let route = Route::new(vec![("broken".into(), broken), ("near".into(), near.clone())]);
        let answer = route.stream(&asked("hi", 5), &Context::default()).and_then(collect);
        assert_eq!(asked_times.load(Ordering::SeqCst), 1);
        match answer {
            Ok(whole) => {
                assert!(falls_back && whole.text() == want && whole.start.model == "llama", "{before:?} {kind:?}")
            }
            Err(error) => assert!(!falls_back && error.kind == kind, "{before:?} {kind:?}: {error}"),
        }
    }
    Ok(())
}

/// Nobody saw a word of it.
#[test]
fn an_unstreamed_answer_that_breaks_off_is_given_by_the_next_handler() -> Result<()> {
    let start = Event::start("broken", "broken", "broken");
    let before = vec![start, Event::text("half")];
    let near = local()?;
    let want = near.complete(&asked("hi", 5), &Context::default())?.text().to_owned();
    for (kind, falls_back) in [
        (Kind::Cut, true),
        (Kind::Protocol, true),
        (Kind::Unavailable, true),
        (Kind::InvalidRequest { param: None }, false),
        (Kind::Cancelled, false),
    ] {
        let error = HandlerError::new(kind.clone(), "broken");
        let broken: Arc<dyn Handler> = Arc::new(Fails { before: before.clone(), error, asked: Arc::default() });
        let route = Route::new(vec![("broken".into(), broken.clone()), ("near".into(), near.clone())]);
        match route.complete(&asked("hi", 5), &Context::default()) {
            Ok(whole) => {
                assert!(
                    falls_back && whole.text() == want && whole.start.handler == "llama" && !whole.start.id.is_empty(),
                    "{kind:?}"
                );
            }
            Err(error) => assert!(!falls_back && error.kind == kind, "{kind:?}: {error}"),
        }
        let last = Route::new(vec![("broken".into(), broken)]);
        assert_eq!(last.complete(&asked("hi", 5), &Context::default()).expect_err("no other").kind, kind);
    }
    Ok(())
}

// The server.
