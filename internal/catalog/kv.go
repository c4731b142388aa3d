package catalog

import (
	"context"
	"time"
)

// KV is an ordered store of keys with revisions, transactions, watches and
// leases: the part of etcd that the catalog stands on. Implementations are Etcd
// and the clients of Memory; one conformance suite holds them to this contract.
// All methods may be called concurrently.
//
// Errors are of the kinds in package atoll. ErrTimeout and ErrUnreachable leave
// it unknown whether a write was done; ErrInvalid, ErrTooLarge, ErrNoSpace,
// ErrNotExist (of a lease) and ErrClosed say that it was not. Reads are
// linearizable. Every call ends with its context; calls without a deadline end
// after atoll.RequestTimeout.
type KV interface {
	// Get returns the value of a key; ErrNotExist if there is none.
	Get(ctx context.Context, key string) (KeyValue, error)
	// Range returns the keys that begin with prefix and are greater than after,
	// in ascending order, at most limit of them (0: all), as they were at one
	// revision, and that revision.
	Range(ctx context.Context, prefix, after string, limit int) ([]KeyValue, int64, error)
	// Txn does t atomically. It never repeats a transaction that may have been
	// done.
	Txn(ctx context.Context, t Txn) (TxnResult, error)
	// Watch tells the changes of keys that begin with prefix from revision rev
	// on, in order, each revision in one piece. A batch with an error is the
	// last: ErrConflict when changes since rev were forgotten by compaction,
	// else ErrUnreachable. The channel is closed after that, or when ctx ends.
	Watch(ctx context.Context, prefix string, rev int64) <-chan WatchBatch
	// Grant makes a lease that ends ttl after its last renewal, and with it
	// every key put under it. It may end somewhat later, never earlier.
	Grant(ctx context.Context, ttl time.Duration) (LeaseID, error)
	// KeepAlive renews a lease once; ErrNotExist when it has ended.
	KeepAlive(ctx context.Context, id LeaseID) error
	// Revoke ends a lease and deletes its keys. One that has ended is no error.
	Revoke(ctx context.Context, id LeaseID) error
}

// LeaseID names a lease; 0 means "none".
type LeaseID int64

// KeyValue is a key as it is stored. The value must not be changed.
type KeyValue struct {
	Key   string
	Value []byte
	Mod   int64 // revision of its last change; 0 means the key does not exist
	Lease LeaseID
}

// Cmp is a condition on one key.
type Cmp struct {
	Key  string
	Kind CmpKind
	Rev  int64  // for IfRev; 0 means the key does not exist
	Val  []byte // for IfValue
}

// CmpKind tells what a Cmp looks at.
type CmpKind uint8

// Kinds of condition.
const (
	// IfRev holds when the key was last changed at Rev, or does not exist and
	// Rev is 0.
	IfRev CmpKind = iota
	// IfExists holds when the key exists.
	IfExists
	// IfValue holds when the key exists with the value Val.
	IfValue
)

// Op puts or deletes one key.
type Op struct {
	Key    string
	Value  []byte
	Lease  LeaseID // put: the key ends with this lease; 0 keeps it for ever
	Delete bool
}

// Txn is a transaction: if all conditions hold, do all operations. No key may
// be named by two operations.
type Txn struct {
	If   []Cmp
	Then []Op
	// Read lists keys to return as they were before the operations, whether the
	// conditions held or not.
	Read []string
}

// TxnResult tells what a transaction did.
type TxnResult struct {
	OK  bool       // the conditions held and the operations were done
	Rev int64      // of the store after it; of every key written by it
	Got []KeyValue // one for each key of Read; Mod 0 where there is none
}

// WatchBatch is some changes in order.
type WatchBatch struct {
	Events []Event
	Err    error
}

// Event is one change: a put, or a deletion (then Mod is its revision and there
// is no value).
type Event struct {
	KeyValue
	Deleted bool
}
