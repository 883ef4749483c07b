# What `__init__.py` imports when it is asked for, as editors and type checkers see it.

from bn_tf1 import compiled as compiled
from bn_tf1 import layers as layers
from bn_tf1 import recipe as recipe
from bn_tf1 import slim as slim
from bn_tf1.arguments import WarmUp as WarmUp
from bn_tf1.builder import batch_norm as batch_norm
from bn_tf1.built_layers import BatchNormCall as BatchNormCall
from bn_tf1.built_layers import batch_norm_calls as batch_norm_calls
from bn_tf1.checkpoints.conversion import convert as convert
from bn_tf1.checkpoints.restore import RestoreReport as RestoreReport
from bn_tf1.checkpoints.restore import restore as restore
from bn_tf1.doctor.examination import Examination as Examination
from bn_tf1.doctor.examination import audit as audit
from bn_tf1.doctor.examination import examine as examine
from bn_tf1.doctor.findings import Finding as Finding
from bn_tf1.doctor.lint import lint as lint
from bn_tf1.doctor.statistics_watch import StatisticsHook as StatisticsHook
from bn_tf1.doctor.statistics_watch import check_statistics as check_statistics
from bn_tf1.doctor.training_lint import make_train_op as make_train_op
from bn_tf1.graphs.migrate import migrate_graph as migrate_graph
from bn_tf1.installation.everything import install as install
from bn_tf1.installation.everything import uninstall as uninstall
from bn_tf1.jobs.finished.exported_runs import export as export
from bn_tf1.jobs.memory_allocator import keep_memory as keep_memory
from bn_tf1.jobs.saving.safe_saver import SafeSaver as SafeSaver
from bn_tf1.moving_averages import UPDATE_OPS_COLLECTION as UPDATE_OPS_COLLECTION
from bn_tf1.population.divergence import Divergence as Divergence
from bn_tf1.population.divergence import LayerTensors as LayerTensors
from bn_tf1.population.divergence import divergence as divergence
from bn_tf1.population.recalibration import recalibrate as recalibrate
from bn_tf1.statistics import Renormalization as Renormalization
from bn_tf1.workers.cluster import Workers as Workers
from bn_tf1.workers.handshake import WorkersError as WorkersError

__version__: str
