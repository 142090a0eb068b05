//! The async face on tokio.

use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;

use latzero::{App, Bytes, Code};
use serde_json::{Value, json};

use crate::fake::{Fake, Over};

async fn app(fake: &Fake, name: &str) -> App {
    App::connect(&fake.url(name)).await.unwrap()
}

/// Runs `test` on both kinds of runtime and over both kinds of sockets.
fn everywhere<F: Future<Output = ()>>(test: impl Fn(Fake) -> F) {
    for over in [Over::Unix, Over::Tcp] {
        let one = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        one.block_on(test(Fake::broker(over)));
        let many = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        many.block_on(test(Fake::broker(over)));
    }
}

#[test]
fn calls_and_answers() {
    everywhere(async |fake| {
        let server = app(&fake, "server").await;
        server
            .serve("double", |req| async move { Ok(req.data::<i64>()? * 2) })
            .await
            .unwrap();
        server
            .serve("echo", |req| async move {
                Ok(Bytes(req.bytes().unwrap_or(b"none").to_vec()))
            })
            .await
            .unwrap();
        let caller = app(&fake, "caller").await;
        for n in 0..100 {
            assert_eq!(
                caller.call("double", &n).send::<i64>().await.unwrap(),
                n * 2
            );
        }
        assert_eq!(caller.call("double", &21).await.unwrap(), json!(42));
        let bytes = caller
            .call("echo", &())
            .raw_bytes(vec![1, 2])
            .bytes()
            .await
            .unwrap();
        assert_eq!(bytes, Bytes(vec![1, 2]));
        caller.close().await.unwrap();
        let error = caller.call("double", &1).await.unwrap_err();
        assert_eq!(error.kind(), Code::Disconnected);
    });
}

#[test]
fn a_thousand_calls_at_once() {
    everywhere(async |fake| {
        let server = app(&fake, "server").await;
        server
            .serve("double", |req| async move {
                tokio::task::yield_now().await;
                Ok(req.data::<i64>()? * 2)
            })
            .await
            .unwrap();
        let caller = app(&fake, "caller").await;
        let tasks: Vec<_> = (0..1000)
            .map(|n| {
                let caller = caller.clone();
                tokio::spawn(async move { caller.call("double", &n).send::<i64>().await })
            })
            .collect();
        for (n, task) in tasks.into_iter().enumerate() {
            assert_eq!(task.await.unwrap().unwrap(), n as i64 * 2);
        }
    });
}

#[test]
fn emits_and_events() {
    everywhere(async |fake| {
        let listener = app(&fake, "listener").await;
        let mut news = listener.on("news").await.unwrap();
        let mut events = listener.watch("alpha").await.unwrap();
        let sender = app(&fake, "sender").await;
        assert_eq!(events.next().await.unwrap().app_id(), Some("sender"));
        for n in 0..100 {
            sender.emit("news", &n).await.unwrap();
        }
        for n in 0..100 {
            assert_eq!(news.next().await.unwrap().data::<i64>().unwrap(), n);
        }
        assert_eq!(
            sender
                .emit("news", &1)
                .to("nobody")
                .counted()
                .await
                .unwrap(),
            0
        );
    });
}

#[test]
fn streams_and_progress() {
    everywhere(async |fake| {
        let server = app(&fake, "server").await;
        server
            .serve("count", |req| async move {
                for n in 0..req.data::<u64>()? {
                    req.partial(&n).await?;
                }
                Ok(json!("end"))
            })
            .await
            .unwrap();
        let caller = app(&fake, "caller").await;
        let mut stream = caller.call("count", &1000).window(16).stream::<u64>();
        for n in 0..1000 {
            assert_eq!(stream.next().await.unwrap().unwrap(), n);
        }
        assert!(stream.next().await.is_none());
        assert_eq!(stream.end().unwrap().json(), Some("\"end\""));
    });
}

#[test]
fn dropping_a_call_drops_its_handler() {
    struct Tell(std::sync::mpsc::Sender<()>);
    impl Drop for Tell {
        fn drop(&mut self) {
            let _ = self.0.send(());
        }
    }
    everywhere(async |fake| {
        let server = app(&fake, "server").await;
        let (tx, rx) = std::sync::mpsc::channel();
        let (started, start) = std::sync::mpsc::channel();
        server
            .serve("never", move |_| {
                let tell = Tell(tx.clone());
                let _ = started.send(());
                async move {
                    std::future::pending::<()>().await;
                    drop(tell);
                    Ok(())
                }
            })
            .await
            .unwrap();
        let caller = app(&fake, "caller").await;
        let call = tokio::spawn(caller.call("never", &()).send::<Value>());
        tokio::task::spawn_blocking(move || start.recv().unwrap())
            .await
            .unwrap();
        call.abort();
        tokio::task::spawn_blocking(move || rx.recv_timeout(Duration::from_secs(10)).unwrap())
            .await
            .unwrap();
    });
}

#[test]
fn a_handler_has_a_bounded_number_of_emits() {
    everywhere(async |fake| {
        let (server, caller) = (app(&fake, "server").await, app(&fake, "caller").await);
        // Emptied, it lets all of them go on.
        let held = Arc::new(Mutex::new(Some(Vec::new())));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (holds, sees) = (held.clone(), seen.clone());
        let slow = move |request: latzero::Request| {
            let (holds, sees) = (holds.clone(), sees.clone());
            async move {
                poll_fn(|cx| match &mut *holds.lock().unwrap() {
                    Some(wakers) => {
                        wakers.push(cx.waker().clone());
                        Poll::Pending
                    }
                    None => Poll::Ready(()),
                })
                .await;
                sees.lock().unwrap().push(request.lost());
                Ok(())
            }
        };
        server.serve("slow", slow).await.unwrap();
        for n in 0..1100 {
            caller.emit("slow", &n).await.unwrap();
        }
        while server.lost() < 1100 - 1024 {
            server.ping().await.unwrap();
        }
        let wakers = held.lock().unwrap().take();
        wakers.into_iter().flatten().for_each(Waker::wake);
        while seen.lock().unwrap().len() < 1024 {
            server.ping().await.unwrap();
        }
        caller.emit("slow", &0).await.unwrap();
        while seen.lock().unwrap().len() < 1025 {
            server.ping().await.unwrap();
        }
        let seen = seen.lock().unwrap();
        assert!(seen[..1024].iter().all(|lost| *lost == 0));
        assert_eq!(seen[1024], 1100 - 1024);
    });
}
