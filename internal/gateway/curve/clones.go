package curve

import (
	"context"
	"encoding/json"
	"errors"
	"net/url"
	"strconv"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// Types and states of tasks, as Curve numbers them.
const (
	taskClone   = 0
	taskRecover = 1

	taskDone          = 0
	taskCloning       = 1
	taskError         = 5
	taskMetaInstalled = 7
)

// task is a clone or a recovery, as it is kept with the volume it made.
type task struct {
	UUID    string `json:"uuid"`
	Type    int    `json:"type"`
	User    string `json:"user"`
	Source  string `json:"source"`
	Lazy    bool   `json:"lazy"`
	Time    int64  `json:"time"`              // microseconds
	Flatten string `json:"flatten,omitempty"` // Atoll's task that makes it independent
	Done    bool   `json:"done,omitempty"`
}

// maxTasks is how many tasks a volume remembers.
const maxTasks = 4

// parseTasks reads the tasks of a volume, oldest first.
func parseTasks(text string) (out []task) {
	if text == "" || json.Unmarshal([]byte(text), &out) != nil {
		return nil
	}
	return out
}

// parseTask returns the clone that made a volume.
func parseTask(text string) (task, bool) {
	for _, t := range parseTasks(text) {
		if t.Type == taskClone {
			return t, true
		}
	}
	return task{}, false
}

// fileStatus is what stat tells of a volume that a clone made, without asking
// how far it is.
func (t task) fileStatus() int {
	switch {
	case t.Done:
		return statusCloned
	case t.Flatten != "":
		return statusCloning
	}
	return statusMetaInstalled
}

// TaskInfo is what the snapshot server tells of a task.
type TaskInfo struct {
	UUID       string
	User       string
	File       string
	Src        string
	TaskType   int
	TaskStatus int
	IsLazy     bool
	NextStep   int
	Time       int64
	Progress   int
	FileType   int // of the source: 0 a volume, 1 a snapshot
}

// cloneFile makes a volume of a snapshot or of the present state of another
// volume. It is whole at once; a clone that is not lazy is also made independent
// of its source, in the background.
func (g *Gateway) cloneFile(ctx context.Context, q url.Values, out answer) error {
	user, dest := q.Get("User"), q.Get("Destination")
	lazy, _ := parseBool(q.Get("Lazy"))
	if checkPath(dest) != nil {
		return snapInternal
	}
	if old, err := g.find(ctx, dest); err == nil {
		if t, ok := clonedBy(old); ok {
			out["UUID"] = t.UUID // asked before
			return nil
		}
		return snapFileExist
	} else if CodeOf(err) != NotExist {
		return err
	}
	src, number, err := g.cloneSource(ctx, user, q.Get("Source"))
	if err != nil {
		return err
	}
	v, err := g.b.CloneVersion(ctx, &atollv1.CloneVersionRequest{
		Source: versionName(src.path, number), Name: entryPath(dest), Owner: user, Cache: "writethrough", NoParents: true,
		Properties: map[string]string{propPoolset: defaultPoolset},
	})
	if _, _, snap := unpackUUID(q.Get("Source"), kindSnapshot); !snap {
		// Its version is needed no longer than its clone.
		_, derr := g.b.DeleteVersion(ctx, &atollv1.DeleteVersionRequest{Name: versionName(src.path, number)})
		if derr != nil {
			g.o.Log.Warn("version of a clone not removed", "version", versionName(src.path, number), "err", derr)
		}
	}
	if errors.Is(err, atoll.ErrExist) {
		return snapFileExist
	} else if err != nil {
		return snapInternal
	}
	t := task{UUID: packUUID(v.Id, kindTask, newNumber()), Type: taskClone, User: user, Source: q.Get("Source"), Lazy: lazy, Time: time.Now().UnixMicro()}
	if !lazy {
		ft, err := g.b.Flatten(ctx, &atollv1.FlattenRequest{Name: v.Name})
		if err != nil {
			return err
		}
		t.Flatten = ft.Id
	}
	out["UUID"] = t.UUID
	return g.keepTasks(ctx, v.Name, []task{t})
}

// clonedBy returns the clone that made a file.
func clonedBy(n *node) (task, bool) {
	if n.entry == nil {
		return task{}, false
	}
	return parseTask(n.entry.Properties[propTask])
}

// cloneSource finds what to clone: a snapshot by its UUID, or a volume by its
// path, of which a version is made for the purpose.
func (g *Gateway) cloneSource(ctx context.Context, user, source string) (*node, uint64, error) {
	if _, _, ok := unpackUUID(source, kindSnapshot); ok {
		s, n, err := g.snapshot(ctx, source)
		if err == nil && s.User != user {
			err = snapInvalidUser
		}
		return n, s.SeqNum, err
	}
	if checkPath(source) != nil {
		return nil, 0, snapNotExist
	}
	n, err := g.file(ctx, rootUser, source)
	if err != nil {
		return nil, 0, err
	}
	if err := g.note(ctx, n, propCloned); err != nil {
		return nil, 0, err
	}
	v, err := g.makeVersion(ctx, n.path, "", map[string]string{propInternal: "clone"})
	if err != nil {
		return nil, 0, err
	}
	return n, v.Number, nil
}

// keepTasks notes a volume's tasks with it.
func (g *Gateway) keepTasks(ctx context.Context, path string, tasks []task) error {
	tasks = tasks[max(0, len(tasks)-maxTasks):]
	text := ""
	if len(tasks) > 0 {
		b, err := json.Marshal(tasks)
		if err != nil {
			return err
		}
		text = string(b)
	}
	_, err := g.b.SetProperties(ctx, &atollv1.SetPropertiesRequest{Path: path, Properties: map[string]string{propTask: text}})
	return err
}

// hasClones reports whether clones still share data with a volume.
func (g *Gateway) hasClones(ctx context.Context, n *node) (bool, error) {
	resp, err := g.b.ListChildren(ctx, &atollv1.ListChildrenRequest{Name: n.path})
	if err != nil {
		return false, err
	}
	return len(resp.Children) > 0, nil
}

// recoverFile takes a volume back to one of its snapshots, at once.
func (g *Gateway) recoverFile(ctx context.Context, q url.Values, out answer) error {
	user, dest := q.Get("User"), q.Get("Destination")
	lazy, _ := parseBool(q.Get("Lazy"))
	if checkPath(dest) != nil {
		return snapInternal
	}
	if _, err := g.find(ctx, dest); err != nil {
		return err
	}
	s, n, err := g.snapshot(ctx, q.Get("Source"))
	switch {
	case err != nil:
		return err
	case s.File != dest:
		return snapInvalid
	case s.User != user:
		return snapInvalidUser
	}
	if err := g.idle(ctx, n); err != nil {
		return err
	}
	if _, err := g.b.RestoreVersion(ctx, &atollv1.RestoreVersionRequest{Name: versionName(n.path, s.SeqNum)}); err != nil {
		return err
	}
	t := task{UUID: packUUID(n.entry.Id, kindTask, newNumber()), Type: taskRecover, User: user, Source: s.UUID, Lazy: lazy, Time: time.Now().UnixMicro(), Done: true}
	out["UUID"] = t.UUID
	return g.keepTasks(ctx, n.path, append(parseTasks(n.entry.Properties[propTask]), t))
}

// holder is a volume with its tasks.
type holder struct {
	id, path string
	owner    string
	number   uint64
	tasks    []task
}

func holderOf(e *atollv1.Entry) holder {
	return holder{id: e.Id, path: e.Path, owner: e.Owner, number: e.Number, tasks: parseTasks(e.Properties[propTask])}
}

// task finds a task by its UUID, and which it is.
func (g *Gateway) task(ctx context.Context, uuid string) (holder, int, error) {
	medium, _, ok := unpackUUID(uuid, kindTask)
	if !ok {
		return holder{}, 0, snapNotExist
	}
	e, err := g.b.GetEntry(ctx, &atollv1.GetEntryRequest{Id: medium})
	if err != nil {
		return holder{}, 0, err
	}
	h := holderOf(e)
	for i, t := range h.tasks {
		if t.UUID == uuid {
			return h, i, nil
		}
	}
	return holder{}, 0, snapNotExist
}

// progress tells how far a task is. Flattening that was cut off by a restart is
// begun again, and what has ended is noted.
func (g *Gateway) progress(ctx context.Context, h holder, i int) (status, percent int, err error) {
	t := h.tasks[i]
	switch {
	case t.Done:
		return taskDone, 100, nil
	case t.Flatten == "":
		return taskMetaInstalled, 5, nil
	}
	at, err := g.b.GetTask(ctx, &atollv1.GetTaskRequest{Id: t.Flatten})
	if errors.Is(err, atoll.ErrNotExist) {
		at, err = g.b.Flatten(ctx, &atollv1.FlattenRequest{Name: h.path})
		switch {
		case err == nil:
			h.tasks[i].Flatten = at.Id
			err = g.keepTasks(ctx, h.path, h.tasks)
		case errors.Is(err, atoll.ErrInvalid): // it is no clone any more
			at, err = &atollv1.Task{State: "done"}, nil
		}
	}
	if err != nil {
		return 0, 0, err
	}
	switch at.State {
	case "done":
		h.tasks[i].Done = true
		return taskDone, 100, g.keepTasks(ctx, h.path, h.tasks)
	case "failed", "cancelled":
		return taskError, 0, nil
	}
	if percent = 5; at.Total > 0 {
		percent += int(90 * at.Done / at.Total)
	}
	return taskCloning, percent, nil
}

// info tells of one task.
func (g *Gateway) info(ctx context.Context, h holder, i int) (TaskInfo, error) {
	status, percent, err := g.progress(ctx, h, i)
	t := h.tasks[i]
	x := TaskInfo{UUID: t.UUID, User: t.User, File: "/" + h.path, Src: t.Source, TaskType: t.Type, TaskStatus: status,
		IsLazy: t.Lazy, Time: t.Time, Progress: percent}
	if _, _, snap := unpackUUID(t.Source, kindSnapshot); snap {
		x.FileType = 1
	}
	return x, err
}

// infos tells of all tasks of a volume.
func (g *Gateway) infos(ctx context.Context, h holder) (out []TaskInfo, err error) {
	for i := range h.tasks {
		x, err := g.info(ctx, h, i)
		if err != nil {
			return nil, err
		}
		out = append(out, x)
	}
	return out, nil
}

// allTasks tells of the tasks of all volumes.
func (g *Gateway) allTasks(ctx context.Context) (out []TaskInfo, err error) {
	err = g.eachVolume(ctx, func(v *atollv1.Volume) error {
		tasks := parseTasks(v.Properties[propTask])
		if len(tasks) == 0 {
			return nil
		}
		some, err := g.infos(ctx, holder{id: v.Id, path: v.Name, owner: v.Owner, tasks: tasks})
		out = append(out, some...)
		return err
	})
	return out, err
}

// flatten makes a lazy clone independent of its source, in the background.
func (g *Gateway) flatten(ctx context.Context, q url.Values, _ answer) error {
	h, i, err := g.task(ctx, q.Get("UUID"))
	if err != nil {
		return err
	}
	if h.tasks[i].Done || h.tasks[i].Flatten != "" {
		return nil
	}
	t, err := g.b.Flatten(ctx, &atollv1.FlattenRequest{Name: h.path})
	if err != nil {
		return err
	}
	h.tasks[i].Flatten = t.Id
	return g.keepTasks(ctx, h.path, h.tasks)
}

// cloneTasks tells of one task, of those of a file, or of all of a user.
func (g *Gateway) cloneTasks(ctx context.Context, q url.Values, out answer) error {
	user := q.Get("User")
	var all []TaskInfo
	switch {
	case q.Has("UUID"):
		h, i, err := g.task(ctx, q.Get("UUID"))
		if err != nil {
			return err
		}
		if h.tasks[i].User != user {
			return snapInvalidUser
		}
		x, err := g.info(ctx, h, i)
		if err != nil {
			return err
		}
		all = []TaskInfo{x}
	case q.Has("File"):
		n, err := g.file(ctx, rootUser, q.Get("File"))
		if err != nil {
			return err
		}
		if all, err = g.infos(ctx, holderOf(n.entry)); err != nil {
			return err
		}
		if len(all) == 0 {
			return snapNotExist
		}
	default:
		var err error
		if all, err = g.allTasks(ctx); err != nil {
			return err
		}
	}
	page(q, out, "TaskInfos", keep(all, func(t TaskInfo) bool { return t.User == user }))
	return nil
}

// cleanTask forgets a task that has ended. One that is not there is forgotten.
func (g *Gateway) cleanTask(ctx context.Context, q url.Values, _ answer) error {
	h, i, err := g.task(ctx, q.Get("UUID"))
	switch {
	case snapCodeOf(err) == snapNotExist:
		return nil
	case err != nil:
		return err
	case h.tasks[i].User != q.Get("User"):
		return snapInvalidUser
	}
	status, _, err := g.progress(ctx, h, i)
	if err != nil {
		return err
	}
	if status != taskDone && status != taskError {
		return snapUnfinished
	}
	return g.keepTasks(ctx, h.path, append(h.tasks[:i:i], h.tasks[i+1:]...))
}

// taskList is cloneTasks for administrators: any user, with filters.
func (g *Gateway) taskList(ctx context.Context, q url.Values, out answer) error {
	all, err := g.allTasks(ctx)
	if err != nil {
		return err
	}
	page(q, out, "TaskInfos", keep(all, func(t TaskInfo) bool {
		return matches(q, "UUID", t.UUID) && matches(q, "User", t.User) && matches(q, "Source", t.Src) &&
			matches(q, "Destination", t.File) && matches(q, "Status", strconv.Itoa(t.TaskStatus)) && matches(q, "Type", strconv.Itoa(t.TaskType))
	}))
	return nil
}

// refStatus tells whether clones still need a source: no (0), yes (1), or these
// lazy ones (2).
func (g *Gateway) refStatus(ctx context.Context, q url.Values, out answer) error {
	all, err := g.allTasks(ctx)
	if err != nil {
		return err
	}
	status, list := 0, []map[string]any{}
	for _, t := range all {
		switch {
		case t.Src != q.Get("Source") || t.TaskStatus == taskDone || t.TaskStatus == taskError:
			continue
		case t.TaskStatus == taskMetaInstalled:
			n, err := g.find(ctx, t.File)
			if err != nil {
				continue // gone meanwhile
			}
			list = append(list, map[string]any{"User": t.User, "File": t.File, "Inode": n.ID})
		default:
			status = 1
		}
	}
	out["TotalCount"] = 0
	if status == 0 && len(list) > 0 {
		status = 2
		out["TotalCount"], out["CloneFileInfo"] = len(list), list
	}
	out["RefStatus"] = status
	return nil
}
