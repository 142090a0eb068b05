//! One connection: its operations, and calls, emits, handlers, events and requests.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use latzero::{App, Bytes, Call, Code, Data, Driver, Error, HandlerError, Ran};
use napi::bindgen_prelude::{Array, Either, Function, FunctionRef, Uint8ArraySlice};
use napi::{Env, Result};
use napi_derive::napi;
use serde_json::{Value, json};

use crate::batch::{self, Batch, Outcome, Payload};
use crate::block::{NativeBlock, Open};
use crate::errors::{self, misuse};
use crate::handlers::{Active, Incoming, hand_over};
use crate::mailbox::{self, Mailbox, News};
use crate::memory::Extra;
use crate::options;
use crate::streams::{Inflow, NativeStream, Parking};
use crate::uv::{self, Looping};

/// An operation in progress. It stays on the JavaScript thread.
pub(crate) type Running = Pin<Box<dyn Future<Output = std::result::Result<Outcome, Error>>>>;

/// About how long the text of one batch may be. The rest has its turn after other events.
const BATCH_BYTES: usize = 4 * 1024 * 1024;

struct Task {
    running: Running,
    bell: Arc<mailbox::Waker>,
    waker: Waker,
}

/// A payload as `lib/` passes it: JSON text, or bytes.
pub(crate) type Given<'a> = Either<String, Uint8ArraySlice<'a>>;

/// The payload to send.
pub(crate) fn given(data: Given<'_>) -> Data {
    match data {
        Either::A(json) => Data::Json(json),
        Either::B(bytes) => Data::Bytes(Bytes(bytes.to_vec())),
    }
}

/// A connection, or the attempt to make one.
#[napi(js_name = "App")]
pub struct NativeApp {
    place: Rc<OnceCell<App>>,
    mailbox: Arc<Mailbox>,
    tasks: RefCell<HashMap<u64, Task>>,
    requests: RefCell<HashMap<u64, Active>>,
    /// Results of operations that were done at once.
    done: RefCell<Vec<(u64, std::result::Result<Outcome, Error>)>>,
    news: RefCell<VecDeque<News>>,
    extras: RefCell<Vec<Extra>>,
    /// Blocks that travel with the next call.
    lent: RefCell<Vec<(latzero::Block, bool)>>,
    is_released: Cell<bool>,
    /// The driver, once it is connected and if the event loop drives it.
    driver: Rc<RefCell<Option<Driver>>>,
    wake: RefCell<Option<FunctionRef<(), ()>>>,
    looping: RefCell<Option<Rc<Looping>>>,
}

impl Drop for NativeApp {
    fn drop(&mut self) {
        self.let_go();
        // Before the loop: what has ended needs nobody to drive it.
        self.place = Rc::default();
        self.stop_looping();
    }
}

impl NativeApp {
    pub(crate) fn app(&self) -> Result<&App> {
        match self.place.get() {
            Some(app) if !self.is_released.get() => Ok(app),
            _ => Err(errors::refused(
                Code::Disconnected,
                "the app was closed",
                Some(Ran::No),
            )),
        }
    }

    /// Begins an operation; whether it is done already.
    pub(crate) fn begin(
        &self,
        token: i64,
        running: impl Future<Output = std::result::Result<Outcome, Error>> + 'static,
    ) -> bool {
        let token = token.unsigned_abs();
        let bell = Arc::new(mailbox::Waker {
            mailbox: self.mailbox.clone(),
            token,
            is_queued: AtomicBool::new(false),
        });
        let task = Task {
            running: Box::pin(running),
            waker: Waker::from(bell.clone()),
            bell,
        };
        match self.poll(token, task) {
            Some(result) => {
                self.done.borrow_mut().push((token, result));
                true
            }
            None => false,
        }
    }

    /// Polls an operation; its result, or it is kept.
    fn poll(&self, token: u64, mut task: Task) -> Option<std::result::Result<Outcome, Error>> {
        task.bell.is_queued.store(false, Ordering::Release);
        let mut cx = Context::from_waker(&task.waker);
        match task.running.as_mut().poll(&mut cx) {
            Poll::Ready(result) => Some(result),
            Poll::Pending => {
                self.tasks.borrow_mut().insert(token, task);
                None
            }
        }
    }

    fn let_go(&self) {
        drop(self.tasks.take());
        drop(self.requests.take());
        drop(self.news.take());
        self.mailbox.close();
    }

    fn stop_looping(&self) {
        let looping = self.looping.take();
        if let Some(looping) = looping {
            looping.close();
        }
    }

    /// Lets the event loop drive the app, if it was just connected.
    fn start_looping(&self, env: &Env) {
        let (driver, wake) = (self.driver.take(), self.wake.take());
        if let (Some(driver), Some(wake)) = (driver, wake) {
            let mailbox = self.mailbox.clone();
            let looping = Looping::start(Env::from_raw(env.raw()), driver, mailbox, wake);
            self.looping.replace(looping);
        }
    }

    fn calling(&self, name: &str, data: &Data, options: &options::Send) -> Result<Call> {
        let lent = self.lent.take();
        let mut call = options.call(self.app()?.call(name, data))?;
        for (block, is_writable) in &lent {
            call = match is_writable {
                true => call.block_writable(block),
                false => call.block(block),
            };
        }
        Ok(call)
    }

    fn take_news(&self, news: News, batch: &mut Batch) {
        match news {
            News::Ready(token) => {
                // Not while it is polled: what it drops may come back here.
                let task = self.tasks.borrow_mut().remove(&token);
                if let Some(result) = task.and_then(|task| self.poll(token, task)) {
                    batch.add(token, result);
                }
            }
            News::Request(Incoming::Begin(number, arriving)) => {
                let Some(active) = arriving.take() else {
                    return;
                };
                match batch.add_request(number, &active.meta(), active.request()) {
                    true => {
                        self.requests.borrow_mut().insert(number, active);
                    }
                    false => {
                        let code = Code::TooLarge.as_str();
                        active.end(Err(HandlerError::new(code, batch::TOO_LONG)));
                    }
                }
            }
            News::Request(Incoming::Cancel(number)) => {
                let active = self.requests.borrow_mut().remove(&number);
                if active.is_some() {
                    batch.add_cancel(number);
                }
            }
        }
    }

    pub(crate) fn request(&self, number: i64) -> Option<Arc<latzero::Request>> {
        let requests = self.requests.borrow();
        let active = requests.get(&number.unsigned_abs());
        active.map(|active| active.request().clone())
    }
}

fn options_of(json: Option<&str>) -> Result<options::Send> {
    json.map_or(Ok(options::Send::default()), options::read)
}

#[napi]
impl NativeApp {
    /// Begins to connect, as operation 0. `wake` is called when `drain` has something to do. With
    /// `may_loop` the event loop reads the socket if it can, else a thread does.
    #[napi(constructor)]
    pub fn new(
        url: String,
        options: String,
        wake: Function<'_, (), ()>,
        may_loop: bool,
    ) -> Result<NativeApp> {
        let builder = options::read::<options::Connect>(&options)?.builder(&url)?;
        let app = NativeApp {
            place: Rc::default(),
            mailbox: Arc::new(Mailbox::new(&wake)?),
            tasks: RefCell::default(),
            requests: RefCell::default(),
            done: RefCell::default(),
            news: RefCell::default(),
            extras: RefCell::default(),
            lent: RefCell::default(),
            is_released: Cell::new(false),
            driver: Rc::default(),
            wake: RefCell::default(),
            looping: RefCell::default(),
        };
        let (place, driver) = (app.place.clone(), app.driver.clone());
        let may_loop = may_loop && uv::is_there();
        if may_loop {
            app.wake.replace(Some(wake.create_ref()?));
        }
        app.begin(0, async move {
            let connected = match may_loop {
                true => {
                    let (app, driven) = builder.connect_driven().await?;
                    driver.replace(Some(driven));
                    app
                }
                false => builder.connect().await?,
            };
            let _ = place.set(connected);
            Ok(Outcome::nothing())
        });
        Ok(app)
    }

    /// Does what is ready; a batch as JSON text. Its last element says whether there is more.
    #[napi]
    pub fn drain(&self, env: &Env) -> String {
        let looping = self.looping.borrow().clone();
        if let Some(looping) = looping {
            looping.run_inside();
        }
        let mut batch = Batch::default();
        for (token, result) in self.done.take() {
            batch.add(token, result);
        }
        let mut news = self.news.take();
        news.append(&mut self.mailbox.take());
        while batch.len() < BATCH_BYTES
            && let Some(one) = news.pop_front()
        {
            self.take_news(one, &mut batch);
        }
        let is_more = !news.is_empty();
        self.news.replace(news);
        if self.driver.borrow().is_some() {
            self.start_looping(env);
        }
        let (text, extras) = batch.finish(is_more);
        self.extras.replace(extras);
        text
    }

    /// The values of the last batch that are not JSON.
    #[napi]
    pub fn extras<'env>(&self, env: &'env Env) -> Result<Array<'env>> {
        let extras = self.extras.take();
        let mut array = env.create_array(0)?;
        for extra in extras {
            extra.insert(env, &mut array)?;
        }
        Ok(array)
    }

    /// Ends an operation early: a call is cancelled.
    #[napi]
    pub fn cancel(&self, token: i64) {
        let task = self.tasks.borrow_mut().remove(&token.unsigned_abs());
        drop(task);
    }

    /// Releases everything; operations in progress are dropped.
    #[napi]
    pub fn release(&self) {
        self.is_released.set(true);
        self.let_go();
        self.stop_looping();
    }

    /// The AppID.
    #[napi(getter)]
    pub fn app_id(&self) -> Result<String> {
        Ok(self.app()?.app_id().to_owned())
    }

    /// The id of the live connection.
    #[napi(getter)]
    pub fn instance(&self) -> Result<Option<String>> {
        Ok(self.app()?.instance().map(|id| id.to_string()))
    }

    /// The pools that the app is in.
    #[napi(getter)]
    pub fn joined(&self) -> Result<Vec<String>> {
        Ok(self.app()?.joined())
    }

    /// Whether there is a connection just now.
    #[napi(getter)]
    pub fn is_connected(&self) -> bool {
        self.app().is_ok_and(App::is_connected)
    }

    /// Whether the server has on disk what the app registered.
    #[napi(getter)]
    pub fn is_stored(&self) -> bool {
        self.app().is_ok_and(App::is_stored)
    }

    /// How many events and answers were dropped so far.
    #[napi(getter)]
    pub fn lost(&self) -> f64 {
        self.app().map_or(0.0, |app| app.lost() as f64)
    }

    /// Gives a block along with the next call.
    #[napi]
    pub fn lend(&self, block: &NativeBlock, is_writable: bool) -> Result<()> {
        self.lent.borrow_mut().push((block.get()?, is_writable));
        Ok(())
    }

    /// Takes back what was lent to a call that is not made.
    #[napi]
    pub fn unlend(&self) {
        self.lent.take();
    }

    /// Calls; with `is_reply` the headers come along.
    #[napi]
    pub fn call(
        &self,
        token: i64,
        name: String,
        data: Given<'_>,
        options: Option<String>,
        is_reply: bool,
    ) -> Result<bool> {
        let options = options_of(options.as_deref())?;
        let reply = self.calling(&name, &given(data), &options)?.reply();
        Ok(self.begin(token, async move {
            let reply = reply.await?;
            let headers = is_reply.then(|| reply.headers().into_iter().collect::<HashMap<_, _>>());
            let meta = headers.map(|headers| json!(headers));
            Ok(Outcome::Value(Payload::Reply(reply), meta))
        }))
    }

    /// Makes a call that waits on the server: it is on disk when this is done, also where a handler
    /// takes it at once.
    #[napi]
    pub fn park(
        &self,
        token: i64,
        name: String,
        data: Given<'_>,
        options: Option<String>,
    ) -> Result<bool> {
        let options = options_of(options.as_deref())?;
        let call = self.calling(&name, &given(data), &options)?;
        let parking = call.always_park().send_parked();
        Ok(self.begin(token, async move {
            let parked = Parking::new(parking.await?);
            Ok(Outcome::extra(Extra::Parked(parked)))
        }))
    }

    /// Opens a streamed answer; it is sent with the first item that is asked for.
    #[napi]
    pub fn stream(
        &self,
        name: String,
        data: Given<'_>,
        options: Option<String>,
    ) -> Result<NativeStream> {
        let options = options_of(options.as_deref())?;
        let call = self.calling(&name, &given(data), &options)?;
        let call = match options.window {
            Some(window) => call.window(window),
            None => call,
        };
        Ok(NativeStream::new(call.stream()))
    }

    /// Tells every handler.
    #[napi]
    pub fn emit(
        &self,
        token: i64,
        name: String,
        data: Given<'_>,
        options: Option<String>,
    ) -> Result<bool> {
        let options = options_of(options.as_deref())?;
        let emit = options.emit(self.app()?.emit(&name, &given(data)))?;
        Ok(match options.count {
            true => {
                let counted = emit.counted();
                self.begin(token, async move { Ok(Outcome::of(counted.await?)) })
            }
            false => self.begin(token, async move {
                emit.await?;
                Ok(Outcome::nothing())
            }),
        })
    }

    /// Serves `name`: its requests come with the number `trigger`.
    #[napi]
    pub fn serve(
        &self,
        token: i64,
        name: String,
        trigger: u32,
        options: Option<String>,
    ) -> Result<bool> {
        let options: options::Serve = match options {
            Some(options) => options::read(&options)?,
            None => options::Serve::default(),
        };
        let handler = options.handler(self.app()?.handler(&name))?;
        let mailbox = self.mailbox.clone();
        let serving = handler.serve_detached(move |call| hand_over(call, trigger, &mailbox));
        Ok(self.begin(token, async move {
            serving.await?;
            Ok(Outcome::nothing())
        }))
    }

    /// Serves `name` no longer.
    #[napi]
    pub fn unserve(&self, token: i64, name: String) -> Result<bool> {
        let app = self.app()?.clone();
        Ok(self.begin(token, async move {
            app.unserve(&name).await?;
            Ok(Outcome::nothing())
        }))
    }

    /// Answers a request.
    #[napi]
    pub fn answer(&self, number: i64, data: Given<'_>) -> Result<()> {
        let data = given(data);
        let active = self.requests.borrow_mut().remove(&number.unsigned_abs());
        if let Some(active) = active {
            active.end(Ok(data));
        }
        Ok(())
    }

    /// Answers a request with an error; `data` is JSON.
    #[napi]
    pub fn fail(&self, number: i64, code: String, message: String, data: Option<String>) {
        let active = self.requests.borrow_mut().remove(&number.unsigned_abs());
        if let Some(active) = active {
            active.end(Err(errors::of_handler(code, message, data.as_deref())));
        }
    }

    /// Sends an item of a streamed answer, or with `is_report` a report on its progress.
    #[napi]
    pub fn partial(
        &self,
        token: i64,
        number: i64,
        data: Given<'_>,
        is_report: bool,
    ) -> Result<bool> {
        let data = given(data);
        let request = self.request(number);
        Ok(self.begin(token, async move {
            // A request that has ended has nobody who waits for items.
            let Some(request) = request else {
                return Ok(Outcome::Over);
            };
            match is_report {
                true => request.progress(&data).await?,
                false => request.partial(&data).await?,
            }
            Ok(Outcome::nothing())
        }))
    }

    /// The details of a request; `null` once it has ended.
    #[napi]
    pub fn request_info(&self, number: i64) -> Option<String> {
        let request = self.request(number)?;
        let headers: HashMap<_, _> = request.headers().into_iter().collect();
        let left = request.time_left().map(|time| time.as_secs_f64() * 1000.0);
        let info = json!({
            "headers": headers, "key": request.key(), "attempt": request.attempt(),
            "timeLeftMs": left,
        });
        Some(info.to_string())
    }

    /// A block that came with a request.
    #[napi]
    pub fn request_block(&self, number: i64, id: String) -> Result<NativeBlock> {
        let request = self
            .request(number)
            .ok_or_else(|| misuse("the call has ended, and its blocks with it"))?;
        let block = request.block(&id).map_err(|e| errors::thrown(&e))?;
        Ok(NativeBlock::new(block))
    }

    /// Receives emits of `name`.
    #[napi]
    pub fn events(&self, token: i64, name: String) -> Result<bool> {
        let app = self.app()?.clone();
        Ok(self.begin(token, async move {
            let events = Inflow::emissions(app.on(&name).await?);
            Ok(Outcome::extra(Extra::Inflow(events)))
        }))
    }

    /// Receives the events of a pool.
    #[napi]
    pub fn watch(&self, token: i64, pool: String) -> Result<bool> {
        let app = self.app()?.clone();
        Ok(self.begin(token, async move {
            let events = Inflow::presences(app.watch(&pool).await?);
            Ok(Outcome::extra(Extra::Inflow(events)))
        }))
    }

    /// Answers that nobody in this process waits for.
    #[napi]
    pub fn answers(&self) -> Result<Inflow> {
        Ok(Inflow::answers(self.app()?.answers()))
    }

    /// The changes of the connection from now on.
    #[napi]
    pub fn states(&self) -> Result<Inflow> {
        Ok(Inflow::states(self.app()?.states()))
    }

    /// Joins a pool, or leaves it.
    #[napi]
    pub fn join(&self, token: i64, pool: String, leaves: bool) -> Result<bool> {
        let app = self.app()?.clone();
        Ok(self.begin(token, async move {
            match leaves {
                true => app.leave(&pool).await?,
                false => app.join(&pool).await?,
            }
            Ok(Outcome::nothing())
        }))
    }

    /// Asks the server for anything; `message` is JSON.
    #[napi]
    pub fn ask(&self, token: i64, message: String) -> Result<bool> {
        let message: Value = options::read(&message)?;
        let app = self.app()?.clone();
        Ok(self.begin(token, async move {
            Ok(Outcome::of(app.request(&message).await?))
        }))
    }

    /// How long the server takes to answer, in milliseconds.
    #[napi]
    pub fn ping(&self, token: i64) -> Result<bool> {
        let app = self.app()?.clone();
        Ok(self.begin(token, async move {
            Ok(Outcome::of(app.ping().await?.as_secs_f64() * 1000.0))
        }))
    }

    /// Opens a block: makes it, or attaches it.
    #[napi]
    pub fn block(&self, token: i64, id: String, options: String) -> Result<bool> {
        let opening = options::read::<Open>(&options)?.open(self.app()?, &id)?;
        Ok(self.begin(token, async move {
            let block = opening.await?;
            Ok(Outcome::extra(Extra::Block(NativeBlock::new(block))))
        }))
    }

    /// The blocks of a pool, as the server describes them.
    #[napi]
    pub fn blocks(&self, token: i64, pool: Option<String>) -> Result<bool> {
        let app = self.app()?.clone();
        Ok(self.begin(token, async move {
            Ok(Outcome::of(app.blocks(pool.as_deref()).await?))
        }))
    }

    /// Waits until the app has ended, for whatever reason.
    #[napi]
    pub fn ended(&self, token: i64) -> Result<bool> {
        let ended = self.app()?.ended();
        Ok(self.begin(token, async move {
            ended.await;
            Ok(Outcome::Over)
        }))
    }

    /// Closes.
    #[napi]
    pub fn close(&self, token: i64) -> Result<bool> {
        let app = self.app()?.clone();
        Ok(self.begin(token, async move {
            app.close().await?;
            Ok(Outcome::nothing())
        }))
    }
}
