;; An environment of API 0.2.0. `reset` opens with the start's own messages; the start's reference becomes the tools,
;; and the state is empty. `step` adds the completion's first byte to the state and answers with the completion as a
;; `tool` message; reward is the turn, and the metric `m` the length of the new state. By that first byte:
;; `d` is done without a message; `e` goes on without a message; `n` rewards NaN; `b` returns a state of 65,537 bytes;
;; `c` rewards 1 when the message was complete, else 0; `?` is a sample error; `!` traps in `$explode`.
;; A start whose reference begins with `!` traps, one with `-` opens without messages.
(module
  (memory (export "memory") 4)
  (global $heap (mut i32) (i32.const 4096))

  ;; name `talk`, version `1.0`, no summary, no datasets, no rewards, one environment `e`, no schema, wants nothing.
  (data (i32.const 16) "talk1.0etoolmno")
  (data (i32.const 1024)
    "\10\00\00\00\04\00\00\00" "\14\00\00\00\03\00\00\00" "\00\00\00\00\00\00\00\00" "\00\00\00\00\00\00\00\00"
    "\00\00\00\00\00\00\00\00" "\00\05\00\00\01\00\00\00" "\00\00\00\00\00\00\00\00" "\00\00\00\00\00\00\00\00")
  (data (i32.const 1280) "\17\00\00\00\01\00\00\00")

  (func $alloc (param $bytes i32) (result i32)
    (local $at i32)
    (local.set $at (global.get $heap))
    (global.set $heap (i32.and (i32.add (i32.add (local.get $at) (local.get $bytes)) (i32.const 15)) (i32.const -16)))
    (block $fits
      (loop $more
        (br_if $fits (i32.le_u (global.get $heap) (i32.shl (memory.size) (i32.const 16))))
        (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then unreachable))
        (br $more)))
    (local.get $at))
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (call $alloc (local.get 3)))
  (func (export "cosmos:plugin/metadata@0.2.0#describe") (result i32) (i32.const 1024))

  (func (export "cosmos:plugin/environment@0.2.0#init") (param i32 i32 i32 i32) (result i32)
    (i32.store8 (i32.const 2048) (i32.const 0))
    (i32.const 2048))

  (func $explode unreachable)

  ;; First byte of a text whose pointer and length lie at `$text`; 0 when it is empty.
  (func $first (param $text i32) (result i32)
    (if (result i32) (i32.load offset=4 (local.get $text))
      (then (i32.load8_u (i32.load (local.get $text))))
      (else (i32.const 0))))

  ;; A list of `$count` results of `$size` bytes, all zero.
  (func $results (param $count i32) (param $size i32) (result i32)
    (local $list i32)
    (local.set $list (call $alloc (i32.const 8)))
    (i32.store (local.get $list) (call $alloc (i32.mul (local.get $count) (local.get $size))))
    (i32.store offset=4 (local.get $list) (local.get $count))
    (memory.fill (i32.load (local.get $list)) (i32.const 0) (i32.mul (local.get $count) (local.get $size)))
    (local.get $list))

  (func (export "cosmos:plugin/environment@0.2.0#reset-batch") (param $starts i32) (param $count i32) (result i32)
    (local $list i32) (local $item i32) (local $start i32) (local $at i32)
    (local.set $list (call $results (local.get $count) (i32.const 28)))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $item) (local.get $count)))
        (local.set $start (i32.add (local.get $starts) (i32.mul (local.get $item) (i32.const 24))))
        (local.set $at (i32.add (i32.load (local.get $list)) (i32.mul (local.get $item) (i32.const 28))))
        (if (i32.eq (call $first (i32.add (local.get $start) (i32.const 8))) (i32.const 33)) (then (call $explode)))
        (if (i32.ne (call $first (i32.add (local.get $start) (i32.const 8))) (i32.const 45))
          (then
            (i64.store offset=4 (local.get $at) (i64.load (local.get $start)))
            (i64.store offset=12 (local.get $at) (i64.load offset=8 (local.get $start)))))
        (local.set $item (i32.add (local.get $item) (i32.const 1)))
        (br $next)))
    (local.get $list))

  (func (export "cosmos:plugin/environment@0.2.0#step-batch") (param $actions i32) (param $count i32) (result i32)
    (local $list i32) (local $item i32)
    (local.set $list (call $results (local.get $count) (i32.const 48)))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $item) (local.get $count)))
        (call $step
          (i32.add (local.get $actions) (i32.mul (local.get $item) (i32.const 24)))
          (i32.add (i32.load (local.get $list)) (i32.mul (local.get $item) (i32.const 48))))
        (local.set $item (i32.add (local.get $item) (i32.const 1)))
        (br $next)))
    (local.get $list))

  (func $step (param $action i32) (param $at i32)
    (local $what i32) (local $state i32) (local $bytes i32) (local $part i32)
    (local.set $what (call $first (i32.add (local.get $action) (i32.const 8))))
    (if (i32.eq (local.get $what) (i32.const 33)) (then (call $explode)))
    (if (i32.eq (local.get $what) (i32.const 63))
      (then
        (i32.store8 (local.get $at) (i32.const 1))
        (i32.store offset=8 (local.get $at) (i32.const 29))
        (i32.store offset=12 (local.get $at) (i32.const 2))
        (return)))
    ;; The new state.
    (local.set $bytes (i32.add (i32.load offset=4 (local.get $action)) (i32.const 1)))
    (if (i32.eq (local.get $what) (i32.const 98)) (then (local.set $bytes (i32.const 65537))))
    (local.set $state (call $alloc (local.get $bytes)))
    (memory.copy (local.get $state) (i32.load (local.get $action)) (i32.load offset=4 (local.get $action)))
    (i32.store8 (i32.add (local.get $state) (i32.load offset=4 (local.get $action))) (local.get $what))
    (i32.store offset=16 (local.get $at) (local.get $state))
    (i32.store offset=20 (local.get $at) (local.get $bytes))
    ;; The message: role `tool`, content the completion.
    (if (i32.eqz (i32.or (i32.eq (local.get $what) (i32.const 100)) (i32.eq (local.get $what) (i32.const 101))))
      (then
        (local.set $part (call $alloc (i32.const 16)))
        (i32.store (local.get $part) (i32.const 24))
        (i32.store offset=4 (local.get $part) (i32.const 4))
        (i64.store offset=8 (local.get $part) (i64.load offset=8 (local.get $action)))
        (i32.store offset=8 (local.get $at) (local.get $part))
        (i32.store offset=12 (local.get $at) (i32.const 1))))
    (i32.store8 offset=24 (local.get $at) (i32.eq (local.get $what) (i32.const 100)))
    ;; Reward and metric.
    (f64.store offset=32 (local.get $at) (f64.convert_i32_u (i32.load offset=16 (local.get $action))))
    (if (i32.eq (local.get $what) (i32.const 110)) (then (f64.store offset=32 (local.get $at) (f64.const nan))))
    (if (i32.eq (local.get $what) (i32.const 99))
      (then (f64.store offset=32 (local.get $at) (f64.convert_i32_u (i32.load8_u offset=20 (local.get $action))))))
    (local.set $part (call $alloc (i32.const 16)))
    (i32.store (local.get $part) (i32.const 28))
    (i32.store offset=4 (local.get $part) (i32.const 1))
    (f64.store offset=8 (local.get $part) (f64.convert_i32_u (local.get $bytes)))
    (i32.store offset=40 (local.get $at) (local.get $part))
    (i32.store offset=44 (local.get $at) (i32.const 1)))

  ;; The host has read the results: everything can go.
  (func (export "cabi_post_cosmos:plugin/environment@0.2.0#reset-batch") (param i32)
    (global.set $heap (i32.const 4096)))
  (func (export "cabi_post_cosmos:plugin/environment@0.2.0#step-batch") (param i32)
    (global.set $heap (i32.const 4096))))
