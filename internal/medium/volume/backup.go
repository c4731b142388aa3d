package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/segment"
)

const (
	// shutLimit bounds how long a backup may keep writes waiting for those in
	// flight before it gives up.
	shutLimit = 2 * time.Second
)

// BackupOptions say what a version is called.
type BackupOptions struct {
	Name      string // "" for none; else no other version of the volume may have it
	Memo      string
	Protected bool // DeleteVersion refuses it
	Props     map[string]string
	Flags     medium.Flags // added
}

// Backup makes a version of the volume as it is at one moment between the call
// and its return: every write acknowledged before the call is in it, in the
// memory of writeback or not, and of those running what it keeps of each page is
// from one of them. Durable on return. Its cost does not depend on the size:
// writes through wait for about two appends; with writeback they go on, and the
// call takes as long as a flush, for which discards wait. The map is written out
// afterwards (see Settled); Resize waits for that, and so does an event after too
// many that are not settled yet.
//
// After an error that is not ErrExist, ErrInvalid or ErrTooLarge the version may
// turn up when the volume is opened again.
func (v *Volume) Backup(ctx context.Context, o BackupOptions) (medium.Version, error) {
	list, err := Group(ctx, []*Volume{v}, []BackupOptions{o})
	if err != nil {
		return medium.Version{}, err
	}
	return list[0], nil
}

// Group is Backup of several volumes at one moment: no write to any of them that
// began after one in a version had returned is in another without it. After an
// error there is no version in any that users see, as far as that is known.
func Group(ctx context.Context, volumes []*Volume, opts []BackupOptions) ([]medium.Version, error) {
	if len(volumes) != len(opts) || len(volumes) == 0 {
		return nil, fmt.Errorf("back up %d volumes with %d options: %w", len(volumes), len(opts), atoll.ErrInvalid)
	}
	jobs := make([]*job, len(volumes))
	for i, v := range volumes {
		jobs[i] = &job{v: v, event: event{
			Medium: v.id, Name: opts[i].Name, Memo: opts[i].Memo, Props: opts[i].Props, Flags: opts[i].Flags, Time: time.Now().UTC(),
		}}
		if opts[i].Protected {
			jobs[i].event.Flags |= medium.FlagProtected
		}
	}
	if err := runJobs(ctx, jobs); err != nil {
		return nil, err
	}
	list := make([]medium.Version, len(jobs))
	for i, j := range jobs {
		list[i] = j.made
	}
	return list, nil
}

// Restore makes the volume, its size included, what it was at a version, at one
// moment between the call and its return. Versions made since stay. What the
// volume was before is given back in the background. Reads see the old state or
// the new one, and so do writes that run meanwhile. Durable on return. ErrNotExist.
//
// When the record fails, writes wait until a checkpoint has made sure that it
// does not count. If even that takes too long, the error says that the restore
// may have happened when the volume is opened again; writes wait on.
func (v *Volume) Restore(ctx context.Context, number uint64) error {
	j := &job{v: v, event: event{
		Medium: v.id, Target: number, Time: time.Now().UTC(), Flags: medium.FlagInternal | medium.FlagDeleting,
	}}
	if number == 0 {
		return fmt.Errorf("restore volume %v: no version: %w", v.id, atoll.ErrInvalid)
	}
	return runJobs(ctx, []*job{j})
}

// job is an event on its way.
type job struct {
	v      *Volume
	event  event
	target *rooted
	buf    *host.Buffer // payload of the record
	mark   medium.Mark
	logged bool
	doubt  bool // the append of a restore failed: it may be in the log
	fenced bool // writeback's fence is up
	err    error
	made   medium.Version
}

// runJobs makes events happen at one moment. All happen or none, but for what
// fails in between their records.
func runJobs(ctx context.Context, jobs []*job) error {
	order := inOrder(jobs)
	for i, j := range order {
		var err error
		if i > 0 && order[i-1].v == j.v {
			err = fmt.Errorf("back up volume %v twice: %w", j.v.id, atoll.ErrInvalid)
		} else {
			err = j.begin(ctx)
		}
		if err != nil {
			for _, o := range order[:i] {
				o.v.unlockEvent()
				o.buf.Release()
			}
			return err
		}
	}
	// From here on the caller's context does not count: what becomes of the
	// records must be known.
	whole, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*atoll.RequestTimeout)
	defer cancel()
	if firstError(jobs) == nil && ctx.Err() == nil {
		shutAndLog(whole, jobs)
	}
	for _, j := range jobs {
		j.end(ctx)
	}
	if err := firstError(jobs); err != nil {
		for _, j := range jobs {
			j.disown(whole)
		}
		return err
	}
	if err := ctx.Err(); err != nil && !jobs[0].logged {
		return fmt.Errorf("back up volume %v: %w: %w", jobs[0].v.id, atoll.ErrTimeout, err)
	}
	if jobs[0].event.Target != 0 {
		jobs[0].v.recordSize()
	}
	for _, j := range jobs {
		if err := j.v.serving("back up"); err != nil {
			return err
		}
	}
	return nil
}

// shutAndLog shuts all gates, waits for what is in flight, writes the records
// and makes those that were written happen. The moment of a group is when all
// gates are shut and quiet and all fences are up.
func shutAndLog(ctx context.Context, jobs []*job) {
	for _, j := range jobs {
		j.shut()
	}
	quiet, cancel := context.WithTimeout(ctx, shutLimit)
	each(jobs, func(j *job) { j.err = j.quiet(quiet) })
	cancel()
	if firstError(jobs) == nil {
		raiseFences(jobs)
		each(jobs, func(j *job) {
			if j.fenced {
				j.err = j.v.wb.clear(ctx)
			}
		})
	}
	if firstError(jobs) == nil {
		each(jobs, func(j *job) { j.log(ctx) })
	}
	for _, j := range jobs {
		if j.logged {
			j.made = j.v.happen(&j.event, j.mark, j.target)
		}
		if !j.doubt {
			j.open()
		}
	}
}

// shut keeps changes of the map out; for a restore also pages out of memory.
func (j *job) shut() {
	j.v.gate.close()
	if j.target != nil && j.v.wb != nil {
		j.v.door.close()
		j.v.wb.halt()
	}
}

func (j *job) open() {
	if j.fenced {
		j.v.wb.lower()
	}
	if j.target != nil && j.v.wb != nil {
		j.v.wb.resume(j.logged)
		j.v.era.Add(1) // who read pages of before from memory reads again
		j.v.door.open()
	}
	j.v.gate.open()
}

// quiet waits until what was let in before is done. Pages that are only in
// memory when a restore comes never were on stable storage: they go with the
// state that they belong to.
func (j *job) quiet(ctx context.Context) error {
	if j.target != nil && j.v.wb != nil {
		if err := j.v.door.drain(ctx); err != nil {
			return err
		}
	}
	return j.v.gate.drain(ctx)
}

// raiseFences raises those of all volumes with pages in memory at one moment.
func raiseFences(jobs []*job) {
	var locked []*job
	for _, j := range inOrder(jobs) {
		if j.v.wb != nil && j.target == nil {
			j.v.wb.mu.Lock()
			locked = append(locked, j)
		}
	}
	for _, j := range locked {
		j.v.wb.raise()
		j.fenced = true
	}
	for _, j := range locked {
		j.v.wb.mu.Unlock()
	}
}

// inOrder returns the jobs in the order in which locks are taken.
func inOrder(jobs []*job) []*job {
	order := slices.Clone(jobs)
	slices.SortFunc(order, func(a, b *job) int { return cmp.Compare(a.v.id, b.v.id) })
	return order
}

// each runs fn for all jobs at once.
func each(jobs []*job, fn func(*job)) {
	var wg sync.WaitGroup
	for _, j := range jobs[1:] {
		wg.Go(func() { fn(j) })
	}
	fn(jobs[0])
	wg.Wait()
}

func firstError(jobs []*job) error {
	for _, j := range jobs {
		if j.err != nil {
			what := "back up"
			if j.event.Target != 0 {
				what = "restore"
			}
			return fmt.Errorf("%s volume %v: %w", what, j.v.id, j.err)
		}
	}
	return nil
}

// begin takes the locks and finds out whether the event may be.
func (j *job) begin(ctx context.Context) error {
	v := j.v
	if err := v.lockEvent(ctx, "back up"); err != nil {
		return err
	}
	err := j.allowed(ctx)
	if err == nil {
		v.hist.mu.Lock()
		j.event.Parent = v.hist.parent
		v.hist.mu.Unlock()
		j.event.Size = v.size.Load()
		j.event.Number = v.store.NewVersionNumber()
		j.buf = host.Alloc(atoll.BlockSize)
		if err = j.event.encode(j.buf.Bytes()); err != nil {
			j.buf.Release()
		}
	}
	if err != nil {
		v.unlockEvent()
		return fmt.Errorf("back up volume %v: %w", v.id, err)
	}
	return nil
}

// allowed checks names, and gets the root that a restore needs.
func (j *job) allowed(ctx context.Context) (err error) {
	st := j.v.state()
	if n := j.event.Target; n != 0 {
		if err := j.v.settledVersion(ctx, n); err != nil {
			return err
		}
		p := st.Find(n)
		if p == nil || p.Flags&medium.FlagDeleting != 0 {
			return fmt.Errorf("version %d: %w", n, atoll.ErrNotExist)
		}
		if j.target, err = j.v.source(ctx, n); err == nil {
			j.target.loadAhead(ctx)
		}
		return err
	}
	if j.event.Name == "" {
		return nil
	}
	if err := catalog.ValidateVersionName(j.event.Name); err != nil {
		return err
	}
	if p := st.Named(j.event.Name); p != nil {
		return fmt.Errorf("version %q is there already, it is version %d: %w", p.Name, p.Number, atoll.ErrExist)
	}
	return nil
}

// log writes the record.
func (j *job) log(ctx context.Context) {
	e := j.v.store.NewEntry()
	e.Add(segment.Record{Kind: j.event.kind(), Blocks: 1, Key: j.event.Number, Aux: j.event.Target}, j.buf, j.buf.Bytes())
	j.mark, j.err = j.v.store.AppendMark(ctx, e)
	if j.err != nil {
		j.v.hist.mu.Lock()
		j.v.hist.doubt.Store(true)
		j.v.hist.count++
		j.v.hist.mu.Unlock()
		j.doubt = j.target != nil
		return
	}
	j.logged = true
	j.v.logBytes.Add(2 * atoll.BlockSize)
}

// end hands the locks to the settler, or gives them back.
func (j *job) end(ctx context.Context) {
	j.buf.Release()
	switch {
	case j.doubt:
		j.err = j.v.doubt(ctx, j.err, func() {
			j.open()
			j.v.unlockEvent()
		})
		return
	case !j.logged:
		j.v.unlockEvent()
		return
	}
	j.v.hist.unlock()
	select {
	case j.v.hist.wake <- struct{}{}:
	default:
	}
}

// disown deletes what was made though another of the group failed.
func (j *job) disown(ctx context.Context) {
	if !j.logged || j.event.Target != 0 {
		return
	}
	j.v.hist.mu.Lock()
	for _, p := range j.v.hist.queue {
		if p.v.Number == j.event.Number {
			p.v.Flags = p.v.Flags&^medium.FlagProtected | medium.FlagDeleting
			j.v.hist.mu.Unlock()
			return
		}
	}
	j.v.hist.mu.Unlock()
	if err := j.v.deleteVersion(ctx, j.event.Number, true); err != nil && !errors.Is(err, atoll.ErrNotExist) {
		j.v.log.WarnContext(ctx, "version of a group that failed not deleted", "ver", j.event.Number, "err", err)
	}
}
