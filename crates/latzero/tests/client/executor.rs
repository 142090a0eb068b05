//! The async face without tokio: on an executor of a dozen lines, and after a runtime is gone.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use latzero::App;
use serde_json::json;

use crate::fake::{Fake, Over};

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        std::thread::park();
    }
}

/// Polls all of them until all are done.
async fn all<F: Future + Unpin>(mut futures: Vec<F>) -> Vec<F::Output> {
    let mut done: Vec<_> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        for (future, done) in futures.iter_mut().zip(&mut done) {
            if done.is_none()
                && let Poll::Ready(value) = std::pin::Pin::new(future).poll(cx)
            {
                *done = Some(value);
            }
        }
        if done.iter().all(Option::is_some) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    done.into_iter()
        .map(|value| value.expect("every call is done"))
        .collect()
}

#[test]
fn any_executor_works() {
    for over in [Over::Unix, Over::Tcp] {
        let fake = Fake::broker(over);
        block_on(async {
            let server = App::connect(&fake.url("server")).await.unwrap();
            server
                .serve("double", |req| async move { Ok(req.data::<i64>()? * 2) })
                .await
                .unwrap();
            server
                .serve("through", |req| async move {
                    let app = req.app();
                    Ok(app
                        .call("double", &req.data::<i64>()?)
                        .send::<i64>()
                        .await?)
                })
                .await
                .unwrap();
            server
                .serve("count", |req| async move {
                    for n in 0..100_u64 {
                        req.partial(&n).await?;
                    }
                    Ok(())
                })
                .await
                .unwrap();
            let caller = App::connect(&fake.url("caller")).await.unwrap();
            for name in ["double", "through"] {
                let calls = (0..100)
                    .map(|n| caller.call(name, &n).send::<i64>())
                    .collect();
                for (n, answer) in all(calls).await.into_iter().enumerate() {
                    assert_eq!(answer.unwrap(), n as i64 * 2);
                }
            }
            let mut stream = caller.call("count", &()).window(7).stream::<u64>();
            for n in 0..100 {
                assert_eq!(stream.next().await.unwrap().unwrap(), n);
            }
            assert!(stream.next().await.is_none());
            let mut news = server.on("news").await.unwrap();
            caller.emit("news", &1).await.unwrap();
            assert_eq!(news.next().await.unwrap().data::<i64>().unwrap(), 1);
            caller.close().await.unwrap();
        });
    }
}

#[test]
fn an_app_outlives_its_runtime() {
    let fake = Fake::broker(Over::Unix);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let app = runtime.block_on(async {
        let app = App::connect(&fake.url("a")).await.unwrap();
        app.serve("x", |_| async { Ok(1) }).await.unwrap();
        app
    });
    drop(runtime);
    assert_eq!(block_on(app.call("x", &()).send::<i64>()).unwrap(), 1);
    let app = latzero::blocking::App::from(app);
    assert_eq!(app.call("x", &()).send::<i64>().unwrap(), 1);
}

#[test]
fn calls_may_be_dropped_at_any_time() {
    let fake = Fake::broker(Over::Unix);
    block_on(async {
        let server = App::connect(&fake.url("server")).await.unwrap();
        server
            .serve("echo", |req| async move { Ok(json!(req.data::<i64>()?)) })
            .await
            .unwrap();
        let caller = App::connect(&fake.url("caller")).await.unwrap();
        for polls in 0..4 {
            for n in 0..50_i64 {
                let mut call = caller.call("echo", &n).send::<i64>();
                let mut left = polls;
                // Polled so often, then dropped; the last ones run to their end.
                std::future::poll_fn(|cx| {
                    let ended = std::pin::Pin::new(&mut call).poll(cx).is_ready();
                    left -= 1;
                    if ended || left <= 0 {
                        Poll::Ready(())
                    } else {
                        Poll::Pending
                    }
                })
                .await;
            }
        }
        assert_eq!(caller.call("echo", &7).await.unwrap(), json!(7));
    });
}

#[test]
fn a_call_is_answered_later_from_another_thread() {
    let fake = Fake::broker(Over::Unix);
    block_on(async {
        let server = App::connect(&fake.url("server")).await.unwrap();
        let (give, take) = std::sync::mpsc::channel::<latzero::Unanswered>();
        let answers = std::thread::spawn(move || {
            for call in take {
                match call.request().data::<i64>() {
                    // Dropped without an answer.
                    Ok(0) => {}
                    Ok(n) => call.answer(Ok(n * 2)),
                    Err(error) => call.answer(Err::<(), _>(error)),
                }
            }
        });
        server
            .handler("double")
            .serve_detached(move |call| give.send(call).expect("the other thread lives"))
            .await
            .unwrap();
        let caller = App::connect(&fake.url("caller")).await.unwrap();
        let calls = (1..100).map(|n| caller.call("double", &n).send::<i64>());
        for (n, answer) in all(calls.collect()).await.into_iter().enumerate() {
            assert_eq!(answer.unwrap(), (n as i64 + 1) * 2);
        }
        let error = caller.call("double", &0).await.unwrap_err();
        assert_eq!(error.code(), "handler_error");
        let error = caller.call("double", &"text").await.unwrap_err();
        assert_eq!(error.code(), "bad_message");
        let ended = server.ended();
        server.close().await.unwrap();
        ended.await;
        drop(server);
        answers.join().unwrap();
    });
}
