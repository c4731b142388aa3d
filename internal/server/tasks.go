package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
)

// States of a task.
const (
	taskRunning   = "running"
	taskDone      = "done"
	taskFailed    = "failed"
	taskCancelled = "cancelled"
)

// keptTasks is how many ended tasks are remembered.
const keptTasks = 256

// task is one piece of long work. Its fields but mu are set once.
type task struct {
	id, what, kind, medium, unit string
	started                      time.Time
	cancel                       context.CancelFunc
	ended                        chan struct{}

	mu struct {
		sync.Mutex
		done, total int64
		state       string
		err         error
		end         time.Time
	}
}

// progress tells how far the task is.
func (t *task) progress(done, total int64) {
	t.mu.Lock()
	t.mu.done, t.mu.total = done, total
	t.mu.Unlock()
}

// finish notes how the task ended.
func (t *task) finish(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mu.end, t.mu.err = time.Now(), err
	switch {
	case err == nil:
		t.mu.state = taskDone
	case errors.Is(err, context.Canceled):
		t.mu.state = taskCancelled
	default:
		t.mu.state = taskFailed
	}
}

func (t *task) message() *atollv1.Task {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := &atollv1.Task{
		Id: t.id, What: t.what, Kind: t.kind, Medium: t.medium, Unit: t.unit, Done: t.mu.done, Total: t.mu.total,
		State: t.mu.state, Started: timestamppb.New(t.started),
	}
	if t.mu.err != nil {
		out.Error = t.mu.err.Error()
	}
	if !t.mu.end.IsZero() {
		out.Ended = timestamppb.New(t.mu.end)
	}
	return out
}

// taskSet runs this server's tasks.
type taskSet struct {
	wg   sync.WaitGroup
	ctx  context.Context
	stop context.CancelFunc
	mu   struct {
		sync.Mutex
		last   int
		all    []*task // in order of start
		closed bool
	}
}

func newTaskSet() *taskSet {
	s := &taskSet{}
	s.ctx, s.stop = context.WithCancel(context.Background())
	return s
}

// run starts a task. prefix names the process in the task's id. ErrClosed when
// the server is stopping.
func (s *taskSet) run(prefix string, t *task, fn func(context.Context, *task) error) (*task, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed {
		return nil, fmt.Errorf("start task %q: %w", t.what, atoll.ErrClosed)
	}
	s.mu.last++
	t.id, t.started, t.ended = prefix+"-"+strconv.Itoa(s.mu.last), time.Now(), make(chan struct{})
	t.mu.state = taskRunning
	ctx, cancel := context.WithCancel(s.ctx)
	t.cancel = cancel
	s.mu.all = append(s.mu.all, t)
	s.forget()
	s.wg.Go(func() {
		defer cancel()
		defer close(t.ended)
		err := fn(ctx, t)
		if err != nil && ctx.Err() != nil {
			err = context.Canceled
		}
		t.finish(err)
	})
	return t, nil
}

// forget drops the oldest of many ended tasks. s.mu is held.
func (s *taskSet) forget() {
	for i := 0; i < len(s.mu.all) && len(s.mu.all) > keptTasks; {
		select {
		case <-s.mu.all[i].ended:
			s.mu.all = slices.Delete(s.mu.all, i, i+1)
		default:
			i++
		}
	}
}

func (s *taskSet) list() []*task {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.mu.all)
}

// close cancels all tasks and waits for them.
func (s *taskSet) close() error {
	s.mu.Lock()
	s.mu.closed = true
	s.mu.Unlock()
	s.stop()
	s.wg.Wait()
	return nil
}

// taskPrefix begins the ids of this process's tasks.
func (b *backend) taskPrefix() string { return b.s.session().ID().String()[:8] }

// startTask runs a task of this server.
func (b *backend) startTask(t *task, fn func(context.Context, *task) error) (*task, error) {
	return b.s.tasks.run(b.taskPrefix(), t, fn)
}

// ListTasks implements api.Tasks. Without all it leaves out those that ended
// more than a minute ago.
func (b *backend) ListTasks(ctx context.Context, r *atollv1.ListTasksRequest) (*atollv1.ListTasksResponse, error) {
	out := &atollv1.ListTasksResponse{}
	for _, t := range b.s.tasks.list() {
		m := t.message()
		if r.All || m.Ended == nil || time.Since(m.Ended.AsTime()) < time.Minute {
			out.Tasks = append(out.Tasks, m)
		}
	}
	out.Tasks = append(out.Tasks, b.volumeTasks()...)
	var mu sync.Mutex
	err := b.others(ctx, func(c *api.Client) error {
		resp, err := c.Tasks.ListTasks(api.Forwarding(ctx), message(r))
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		out.Tasks = append(out.Tasks, resp.Msg.Tasks...)
		return nil
	})
	if err != nil {
		b.s.log.Debug("tasks of other servers not listed", "err", err)
	}
	slices.SortFunc(out.Tasks, func(a, b *atollv1.Task) int {
		return cmp.Or(a.Started.AsTime().Compare(b.Started.AsTime()), cmp.Compare(a.Id, b.Id))
	})
	return out, nil
}

// volumeTasks shows what volumes that are open here do by themselves: imports
// that are under way, and deleted versions whose room is not back yet.
func (b *backend) volumeTasks() []*atollv1.Task {
	var out []*atollv1.Task
	add := func(o *openVolume, kind, id, what string, done, total int64, unit string, since time.Time) {
		out = append(out, &atollv1.Task{Id: b.taskPrefix() + "-" + kind + "-" + id, What: what, Kind: kind, Medium: o.name,
			Done: done, Total: total, Unit: unit, State: taskRunning, Started: timestamppb.New(since)})
	}
	for _, o := range b.s.volumes.list() {
		if !o.usable() {
			continue
		}
		if s := b.s.volumes.stagingOf(o); s != nil {
			add(o, "import", s.id, "import to "+o.name, o.vol.Stats().WriteBytes-s.written, 0, "bytes", s.begin)
		}
		n, since := int64(0), time.Now()
		for _, v := range o.vol.Versions() {
			if v.Flags&medium.FlagDeleting != 0 {
				n, since = n+1, minTime(since, v.Time)
			}
		}
		if n > 0 {
			add(o, "reap", o.id.String(), fmt.Sprintf("reclaim deleted versions of %s", o.name), 0, n, "versions", since)
		}
	}
	return out
}

func minTime(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// findTask finds a task of this server, or a client of the server that runs it.
func (b *backend) findTask(ctx context.Context, id string) (*task, *api.Client, error) {
	for _, t := range b.s.tasks.list() {
		if t.id == id {
			return t, nil, nil
		}
	}
	prefix, _, _ := strings.Cut(id, "-")
	for _, p := range b.s.cat.State().Processes {
		if len(prefix) == 8 && strings.HasPrefix(p.ID.String(), prefix) && p.ID != b.s.session().ID() && p.API != "" && !api.Forwarded(ctx) {
			c, err := b.s.neighbours.client(p.API)
			return nil, c, err
		}
	}
	return nil, nil, fmt.Errorf("task %q: %w", id, atoll.ErrNotExist)
}

// GetTask implements api.Tasks.
func (b *backend) GetTask(ctx context.Context, r *atollv1.GetTaskRequest) (*atollv1.Task, error) {
	for _, m := range b.volumeTasks() {
		if m.Id == r.Id {
			return m, nil
		}
	}
	t, c, err := b.findTask(ctx, r.Id)
	if err != nil {
		return nil, err
	}
	if c != nil {
		resp, err := c.Tasks.GetTask(api.Forwarding(ctx), message(r))
		if err != nil {
			return nil, err
		}
		return resp.Msg, nil
	}
	return t.message(), nil
}

// CancelTask implements api.Tasks. It returns when the task has ended.
func (b *backend) CancelTask(ctx context.Context, r *atollv1.CancelTaskRequest) (*atollv1.Task, error) {
	t, c, err := b.findTask(ctx, r.Id)
	if err != nil {
		return nil, err
	}
	if c != nil {
		resp, err := c.Tasks.CancelTask(api.Forwarding(ctx), message(r))
		if err != nil {
			return nil, err
		}
		return resp.Msg, nil
	}
	t.cancel()
	select {
	case <-t.ended:
	case <-ctx.Done():
		return nil, fmt.Errorf("cancel task %q: %w", r.Id, atoll.ErrTimeout)
	}
	return t.message(), nil
}
