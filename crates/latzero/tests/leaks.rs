//! Nothing stays behind: threads and descriptors are those of before once the handles are gone.
//! Alone in its program, since it counts what the whole process has.

#![allow(
    clippy::unwrap_used,
    reason = "a helper of a test that fails fails its test"
)]

mod fake;

use std::time::{Duration, Instant};

use fake::{Fake, Over};

fn count(of: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{of}"))
        .unwrap()
        .count()
}

/// Threads end a little after they are told to; until then, or the deadline, look again.
fn settles_at(expected: (usize, usize)) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let now = (count("task"), count("fd"));
        if now == expected {
            return;
        }
        assert!(
            Instant::now() < end,
            "threads and descriptors: {now:?}, before: {expected:?}"
        );
        std::thread::yield_now();
    }
}

#[test]
fn threads_and_descriptors_end_with_the_last_handle() {
    // Whatever the process keeps for itself is there from here on.
    let before = {
        drop(Fake::broker(Over::Unix));
        (count("task"), count("fd"))
    };
    settles_at(before);
    for round in 0..20 {
        let fake = Fake::broker(if round % 2 == 0 {
            Over::Unix
        } else {
            Over::Tcp
        });
        {
            let server = latzero::blocking::App::connect(&fake.url("server")).unwrap();
            server
                .serve("double", |req| {
                    let n: i64 = req.data()?;
                    Ok(if n == 0 {
                        0
                    } else {
                        req.app().call("double", &0).send::<i64>()? + n * 2
                    })
                })
                .unwrap();
            let _news = server.on("news").unwrap();
            let caller = latzero::blocking::App::connect(&fake.url("caller")).unwrap();
            for n in 0..20 {
                assert_eq!(caller.call("double", &n).send::<i64>().unwrap(), n * 2);
            }
            if round % 3 == 0 {
                caller.close().unwrap();
            }
            if round % 5 == 0 {
                fake.cut();
            }
        }
        {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let left = runtime.block_on(async {
                let server = latzero::App::connect(&fake.url("server")).await.unwrap();
                server
                    // Not the name from above: that app may be connecting again as it ends.
                    .serve("twice", |req| async move { Ok(req.data::<i64>()? * 2) })
                    .await
                    .unwrap();
                let caller = latzero::App::connect(&fake.url("caller")).await.unwrap();
                assert_eq!(caller.call("twice", &4).send::<i64>().await.unwrap(), 8);
                drop(caller.call("twice", &4).send::<i64>());
                server
            });
            drop(runtime);
            drop(left);
        }
        drop(fake);
        settles_at(before);
    }
}
