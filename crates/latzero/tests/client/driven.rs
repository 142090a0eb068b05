//! An app that the program's own event loop drives: here a loop of poll(2).

use std::future::Future;
use std::os::fd::AsFd as _;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use latzero::{App, Driver, Reconnect};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use crate::executor::block_on;
use crate::fake::{Fake, Over};

/// Runs the loop until `future` is done.
fn run<T>(driver: &mut Driver, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let polled = future
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()));
        if let Poll::Ready(value) = polled {
            return value;
        }
        // Other threads finish without waking the loop.
        let pause = Timespec::try_from(Duration::from_millis(5)).unwrap();
        let mut fds = [PollFd::from_borrowed_fd(driver.as_fd(), PollFlags::IN)];
        let is_readable = poll(&mut fds, Some(&pause)).unwrap() > 0;
        let now = Instant::now();
        assert!(now < end, "nothing wakes the loop");
        if is_readable || driver.next_deadline().is_some_and(|next| next <= now) {
            assert!(driver.turn(), "the app ended");
        }
    }
}

fn connect(fake: &Fake) -> (App, Driver) {
    let builder = App::builder(&fake.url("driven")).reconnect(Reconnect {
        pause_min: Duration::from_millis(1),
        pause_max: Duration::from_millis(20),
        ..Reconnect::default()
    });
    block_on(builder.connect_driven()).unwrap()
}

async fn serve_double(app: &App) {
    let double = |req: latzero::Request| async move { Ok(req.data::<i64>()? * 2) };
    app.serve("double", double).await.unwrap();
}

#[test]
fn a_loop_calls_and_serves() {
    for over in [Over::Unix, Over::Tcp] {
        let fake = Fake::broker(over);
        let (app, mut driver) = connect(&fake);
        let first = driver.as_fd().try_clone_to_owned().unwrap();
        run(&mut driver, async {
            serve_double(&app).await;
            app.serve("echo", |req| async move { req.data::<Value>() })
                .await
                .unwrap();
            assert_eq!(app.call("double", &21).await.unwrap(), json!(42));
            // More than a socket takes at once, both ways.
            let long = json!("x".repeat(8_000_000));
            assert_eq!(app.call("echo", &long).await.unwrap(), long);
        });
        // After a loss the same descriptor is watched.
        fake.cut();
        run(&mut driver, async {
            while app.call("double", &4).await.is_err() {}
        });
        drop(first);
        // Another thread waits, and the loop reads for it.
        let theirs = latzero::blocking::App::from(app.clone());
        let other = std::thread::spawn(move || theirs.call("double", &5).send::<i64>());
        run(
            &mut driver,
            std::future::poll_fn(|_| match other.is_finished() {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }),
        );
        assert_eq!(other.join().unwrap().unwrap(), 10);
    }
}

/// A loop that is told to take a turn, and need not be woken for that.
#[derive(Default)]
struct Told(AtomicUsize);

impl Wake for Told {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn calls_of_one_turn_wake_the_loop_once_and_leave_together() {
    let fake = Fake::broker(Over::Unix);
    let (app, mut driver) = connect(&fake);
    run(&mut driver, serve_double(&app));
    let told = Arc::new(Told::default());
    driver.on_wake(&Waker::from(told.clone()));
    assert!(driver.turn());
    told.0.store(0, Ordering::SeqCst);
    let mut calls: Vec<_> = (0..8)
        .map(|n| Box::pin(app.call("double", &n).send::<i64>()))
        .collect();
    let cx = &mut Context::from_waker(Waker::noop());
    for call in &mut calls {
        assert!(call.as_mut().poll(cx).is_pending());
    }
    // Once for the calls after the first, and at most once for their deadlines.
    assert!((1..=2).contains(&told.0.load(Ordering::SeqCst)));
    assert!(driver.turn());
    for (n, call) in (0..).zip(calls) {
        assert_eq!(run(&mut driver, call).unwrap(), n * 2);
    }
}

#[test]
fn a_deadline_passes_without_an_answer() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        peer.welcome();
        while peer.read().is_some() {}
    });
    let (app, mut driver) = connect(&fake);
    let call = app.call("x", &1).timeout(Duration::from_millis(1));
    let error = run(&mut driver, call.send::<Value>()).unwrap_err();
    assert_eq!(error.kind(), latzero::Code::Timeout);
}

#[test]
fn a_thread_goes_on_when_the_loop_has_ended() {
    let fake = Fake::broker(Over::Unix);
    let (app, mut driver) = connect(&fake);
    run(&mut driver, serve_double(&app));
    drop(driver);
    assert_eq!(block_on(app.call("double", &1).send::<i64>()).unwrap(), 2);
}

#[test]
fn a_closed_app_ends_its_loop() {
    let fake = Fake::broker(Over::Unix);
    let (app, mut driver) = connect(&fake);
    drop(app);
    assert!(!driver.turn());
}
